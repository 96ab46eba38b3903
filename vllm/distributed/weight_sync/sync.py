# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`WeightSync`, the trainer's side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from vllm.distributed.weight_sync.clients import Mode
from vllm.distributed.weight_sync.engines import Engines
from vllm.distributed.weight_sync.manifest import manifest_of
from vllm.distributed.weight_sync.memory import STOPPED, require_running
from vllm.distributed.weight_sync.plan import Plan
from vllm.distributed.weight_sync.rendezvous import Rendezvous, address_towards
from vllm.distributed.weight_sync.sender import Sender
from vllm.distributed.weight_sync.traffic import Outgoing
from vllm.entrypoints.llm import LLM
from vllm.logger import init_logger
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.names import ModuleNames
from vllm.v1.engine.async_llm import AsyncLLM

logger = init_logger(__name__)

BUCKET_BYTES = 32 << 20
TIMEOUT_S = 600.0

DONE_LIMIT = 4  # times `timeout`: the first rank waits for several things in turn

Engine = LLM | AsyncLLM | str | Sequence[str]


class WeightSync:
    """Brings a trainer's weights into running engines of the same registered callable.

        sync = WeightSync(model, llm)
        version = sync.update()

    Every rank of the trainer makes one and calls `update`; the first rank's `engine`
    is the one that is used. Each engine rank gets its own parts of the tensors, from
    trainer ranks that have them, rounded to the engine's dtype. After `update` the
    engine answers with the new weights; if it raises, with the old ones.

    Args:
        model: What trains: a plain module, or one with DTensors, with Megatron's
            layers, with vLLM's, or divided by plans.
        engine: An `LLM`, an `AsyncLLM`, or URLs of servers that run with
            `VLLM_SERVER_DEV_MODE=1`.
        parallel_context: Which part of the model this rank has, if it has layers of
            Megatron's or a plan's. Others know it themselves.
        mode: What happens to requests that are running: "keep" lets them go on with
            the new weights, "wait" waits for their end, "abort" ends them.
        staging: "shard" receives beside the weights that serve, while they serve.
            "none" pauses first and writes into them; if that fails, the engine refuses
            requests until an update succeeds.
        transport: "auto" goes by memory that trainer and engine rank share, and by
            network where they are on different machines. "network" always goes by
            network between processes, for machines that let them share none.
        bucket_bytes: How much of a rank's tensors is copied at a time.
        timeout: Seconds for any wait.

    Raises:
        TypeError: `engine` is none of these.
        ValueError: names or shapes of the two sides differ.

    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine | None,
        *,
        parallel_context: ParallelContext | None = None,
        mode: Mode = "keep",
        staging: Literal["shard", "none"] = "shard",
        transport: Literal["auto", "network"] = "auto",
        bucket_bytes: int = BUCKET_BYTES,
        timeout: float = TIMEOUT_S,
    ) -> None:
        if staging not in ("shard", "none"):
            raise ValueError(
                f'WeightSync got staging={staging!r}; expected "shard" or "none".'
            )
        if transport not in ("auto", "network"):
            raise ValueError(
                f'WeightSync got transport={transport!r}; expected "auto" or "network".'
            )
        several = dist.is_initialized()
        self._rank = dist.get_rank() if several else 0
        self._ranks = dist.get_world_size() if several else 1
        self._engines = Engines(_as_list(engine) if self._rank == 0 else [], timeout)
        self._names = ModuleNames(model, parallel_context or ParallelContext())
        self._device = next(model.parameters()).device
        self._mode: Mode = mode
        self._staged = staging == "shard"
        self._network = transport == "network"
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout
        self._version = 0
        self._processes: dict[int, str] = {}  # of engine ranks on this machine
        self._rank_names: list[str] = []
        self._rendezvous: Rendezvous | None = None
        self._sender: Sender | None = None

    @property
    def sent_bytes(self) -> int:
        """How many bytes of this rank's tensors engine ranks got in the last update."""
        return 0 if self._sender is None else self._sender.sent_bytes

    def update(self, *, changed_only: bool = False) -> int:
        """Bring the weights as they are now into the engines.

        Args:
            changed_only: Send only elements that changed in the engine's dtype, with
                the same result to the bit. It is for what travels in buckets: what an
                engine reads where it lies is copied whole, and so is everything in the
                first update and in that after a failure. Each rank keeps a copy of what
                it sends, in the engine's dtype.

        Returns:
            The number of the update, which is the engines' weight version. The first
            is 1, or the one after the newest that an engine has.

        Raises:
            RuntimeError: it failed, on any rank or engine; the text says how. The old
                weights serve on, or with `staging="none"` none.

        """
        if self._sender is None:
            self._meet()
        assert self._rendezvous is not None and self._sender is not None
        self._version += 1
        update = self._version
        failure, cause = "", None
        try:
            if self._rank == 0:
                self._begin(update)
            self._send(update, changed_only)
        except Exception as error:
            failure = f"trainer rank {self._rank}: {type(error).__name__}: {error}"
            cause = error
        self._rendezvous.set(f"sent/{update}/{self._rank}", failure)
        if self._rank == 0:
            self._end(update)
        failure = self._rendezvous.get(
            f"done/{update}",
            what="the trainer's first rank to end the update",
            limit=DONE_LIMIT * self._timeout,
        )
        if failure:
            raise RuntimeError(
                f"Update {update} of the weights failed: {failure}"
            ) from cause
        self._sender.committed = update
        return update

    def close(self) -> None:
        """Give back what was shared with the engines; every rank calls it."""
        if self._sender is None or self._rendezvous is None:
            return
        self._sender.close()
        self._rendezvous.set(f"closed/{self._rank}", True)
        # The store is the first rank's, and others may still read what it said last.
        for rank in range(self._ranks) if self._rank == 0 else ():
            self._rendezvous.get(f"closed/{rank}")
        self._sender = self._rendezvous = None

    # ---- All ranks

    def _meet(self) -> None:
        """Let the ranks of both sides tell each other what they hold."""
        address: list[tuple[str, int] | None] = [None]
        if self._rank == 0:
            self._engines.look()
            host = address_towards(self._engines.urls)
            self._rendezvous = Rendezvous(host, 0, self._timeout)
            address = [self._rendezvous.address]
        if self._ranks > 1:
            dist.broadcast_object_list(address, src=0)
        if self._rendezvous is None:
            assert address[0] is not None
            self._rendezvous = Rendezvous(*address[0], self._timeout)
        rendezvous = self._rendezvous
        manifest = manifest_of(self._names, self._device)
        rendezvous.set_manifest("trainer", self._rank, manifest)
        if self._rank == 0:
            self._init_engines()
            rendezvous.set(
                "engines", [self._engines.rank_names(), self._engines.version]
            )
        self._rank_names, self._version = rendezvous.get("engines")
        sources = rendezvous.get_manifests("trainer", self._ranks)
        targets = rendezvous.get_manifests("engine", len(self._rank_names))
        self._processes = {
            target.location.process: name
            for target, name in zip(targets, self._rank_names, strict=True)
            if target.location.machine == manifest.location.machine
        }
        plan = Plan(sources, targets)
        held = self._names.held
        tensors = [entry.local_tensor for entry in held]
        traffic = Outgoing(
            plan,
            self._rank,
            sources,
            targets,
            self._bucket_bytes,
            shared={i for i, t in enumerate(tensors) if _is_shared(t)},
            network=self._network,
        )
        both = (sources, targets)
        names = self._rank_names
        self._sender = Sender(self._rank, held, traffic, both, rendezvous, names)

    def _send(self, update: int, changed_only: bool) -> None:
        """Send to the engines, if all of them have begun to receive."""
        assert self._rendezvous is not None and self._sender is not None
        begun, whole = self._rendezvous.get(
            f"begun/{update}",
            what="the trainer's first rank to begin the update",
            limit=DONE_LIMIT * self._timeout,
        )
        if begun:
            self._sender.send(update, changed_only and not whole)
        else:
            self._sender.give_up(update)

    # ---- The first rank

    def _init_engines(self) -> None:
        assert self._rendezvous is not None
        host, port = self._rendezvous.address
        self._engines.init(
            {
                "host": host,
                "port": port,
                "trainer_ranks": self._ranks,
                "staged": self._staged,
                "timeout": self._timeout,
            }
        )

    def _begin(self, update: int) -> None:
        """Let all engines begin to receive, and tell all ranks whether they have.

        Raises:
            RuntimeError: some have not.

        """
        assert self._rendezvous is not None
        failures = self._engines.begin(update, None if self._staged else self._mode)
        # What a sleep has dropped is no base for what changed since.
        self._rendezvous.set(f"begun/{update}", [not failures, self._engines.slept])
        if failures:
            raise RuntimeError("; ".join(failures))

    def _end(self, update: int) -> None:
        """Let all engines commit, or none, and tell all ranks of the trainer."""
        assert self._rendezvous is not None
        rendezvous = self._rendezvous
        failures = self._collect(update)
        last = update - 1  # all ranks are in this update, so they have read its keys
        shared = (f"begun/{last}", f"verdict/{last}", f"done/{last}")
        for key in (*self._said_by(last), *shared):
            rendezvous.forget(key)
        engines = self._engines
        if self._staged and not failures:
            # Before the verdict, so that none commits if one engine is gone.
            failures += engines.call(lambda client: client.pause(self._mode))
        commits = not failures
        rendezvous.set(f"verdict/{update}", commits)
        version = str(update) if commits else None
        failures += engines.finish(version)
        if commits:
            failures += engines.call(lambda client: client.clear_caches())
        failures += engines.call(lambda client: client.resume())
        if commits and failures:
            failures.append(f"all engines that are not named serve version {update}")
        rendezvous.set(f"done/{update}", "; ".join(failures))

    def _said_by(self, update: int) -> dict[str, str]:
        """By key, the rank that says how it did in an update."""
        trainers = range(self._ranks)
        said_by = {f"sent/{update}/{rank}": f"trainer rank {rank}" for rank in trainers}
        for rank, name in enumerate(self._rank_names):
            said_by[f"received/{update}/{rank}"] = name
        return said_by

    def _collect(self, update: int) -> list[str]:
        """What every rank of both sides says of an update, if it is not well."""
        assert self._rendezvous is not None
        begun, _ = self._rendezvous.get(f"begun/{update}")
        failures = []
        for key, name in self._said_by(update).items():
            if key.startswith("received") and not begun:
                break  # it may never say anything, and nothing was sent to it
            try:
                what = f"{name} to say that the update has arrived"
                said = self._rendezvous.get(key, self._check, what)
            except (ConnectionError, TimeoutError) as error:
                failures.append(str(error))
                break
            if said:
                failures.append(said if key.startswith("sent") else f"{name}: {said}")
        # Engines that were told to stop are not what went wrong.
        causes = [failure for failure in failures if not failure.endswith(STOPPED)]
        return causes or failures

    def _check(self) -> None:
        """Raise ConnectionError if an engine is gone."""
        require_running(self._processes)
        self._engines.check()


def _is_shared(tensor: torch.Tensor) -> bool:
    """Whether other processes of the machine can map it."""
    return tensor.device.type == "cpu" and tensor.is_shared()


def _as_list(engine: Engine | None) -> list[Any]:
    if engine is None or isinstance(engine, (LLM, AsyncLLM, str)):
        return [engine]
    return list(engine)
