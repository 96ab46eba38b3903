# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`WeightSync`, the trainer's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from vllm.distributed.weight_sync.clients import Client, Mode, client_of
from vllm.distributed.weight_sync.manifest import manifest_of
from vllm.distributed.weight_sync.memory import require_running
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

BUCKET_BYTES = 64 << 20
TIMEOUT_S = 600.0

Engines = LLM | AsyncLLM | str | Sequence[str]


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
        engine: Engines | None,
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
        self._engines = _as_list(engine) if self._rank == 0 else []
        self._clients = [client_of(each, timeout) for each in self._engines]
        self._names = ModuleNames(model, parallel_context or ParallelContext())
        self._device = next(model.parameters()).device
        self._mode: Mode = mode
        self._staged = staging == "shard"
        self._network = transport == "network"
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout
        self._version = 0
        self._processes: list[int] = []
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
            The number of the update, from 1: the engines' weight version.

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
            self._sender.send(update, changed_only)
        except Exception as error:
            failure = f"trainer rank {self._rank}: {type(error).__name__}: {error}"
            cause = error
        self._rendezvous.set(f"sent/{update}/{self._rank}", failure)
        if self._rank == 0:
            self._end(update)
        failure = self._rendezvous.get(f"done/{update}")
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
        sizes = [client.size() for client in self._clients]
        if self._rank == 0:
            urls = [each for each in self._engines if isinstance(each, str)]
            self._rendezvous = Rendezvous(address_towards(urls), 0, self._timeout)
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
            rendezvous.set("sizes", sizes)
            self._init_engines(sizes)
        engine_ranks = sum(rendezvous.get("sizes"))
        sources = rendezvous.get_manifests("trainer", self._ranks)
        targets = rendezvous.get_manifests("engine", engine_ranks)
        self._processes = [
            target.location.process
            for target in targets
            if target.location.machine == manifest.location.machine
        ]
        self._engine_ranks = engine_ranks
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
        self._sender = Sender(self._rank, held, traffic, (sources, targets), rendezvous)

    # ---- The first rank

    def _init_engines(self, sizes: list[int]) -> None:
        assert self._rendezvous is not None
        host, port = self._rendezvous.address
        for number, client in enumerate(self._clients):
            client.init(
                {
                    "host": host,
                    "port": port,
                    "first_rank": sum(sizes[:number]),
                    "trainer_ranks": self._ranks,
                    "staged": self._staged,
                    "timeout": self._timeout,
                }
            )

    def _begin(self, update: int) -> None:
        if not self._staged:
            for client in self._clients:
                client.pause(self._mode)
        for client in self._clients:
            client.begin(update)

    def _end(self, update: int) -> None:
        """Let all engines commit, or none, and tell all ranks of the trainer."""
        assert self._rendezvous is not None
        rendezvous = self._rendezvous
        failures = self._collect(update)
        last = update - 1  # all ranks are in this update, so they have read its keys
        for key in (*self._keys(last), f"verdict/{last}", f"done/{last}"):
            rendezvous.forget(key)
        if self._staged and not failures:
            # Before the verdict, so that none commits if one engine is gone.
            failures += self._call_each(lambda client: client.pause(self._mode))
        commits = not failures
        rendezvous.set(f"verdict/{update}", commits)
        version = str(update) if commits else None
        failures += self._call_each(lambda client: client.finish(version))
        if commits:
            failures += self._call_each(lambda client: client.clear_caches())
        failures += self._call_each(lambda client: client.resume())
        rendezvous.set(f"done/{update}", "; ".join(failures))

    def _call_each(self, call: Callable[[Client], None]) -> list[str]:
        """Call every engine, also after one has failed; how those failed."""
        failures = []
        for client in self._clients:
            try:
                call(client)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")
        return failures

    def _keys(self, update: int) -> list[str]:
        """What each rank of both sides says under."""
        sent = [f"sent/{update}/{rank}" for rank in range(self._ranks)]
        return sent + [f"received/{update}/{r}" for r in range(self._engine_ranks)]

    def _collect(self, update: int) -> list[str]:
        """What every rank of both sides says of an update, if it is not well."""
        assert self._rendezvous is not None
        failures = []
        for key in self._keys(update):
            try:
                said = self._rendezvous.get(
                    key, lambda: require_running(self._processes)
                )
            except (ConnectionError, TimeoutError) as error:
                said = str(error)
                failures.append(said)
                break
            if said:
                failures.append(said)
        return failures


def _is_shared(tensor: torch.Tensor) -> bool:
    """Whether other processes of the machine can map it."""
    return tensor.device.type == "cpu" and tensor.is_shared()


def _as_list(engine: Engines | None) -> list[LLM | AsyncLLM | str]:
    if engine is None or isinstance(engine, (LLM, AsyncLLM, str)):
        return [engine]  # type: ignore[list-item]
    return list(engine)
