# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's side of `vllm.distributed.weight_sync`, a backend of weight transfer."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_sync.manifest import manifest_of
from vllm.distributed.weight_sync.network import NetworkReceiver
from vllm.distributed.weight_sync.receiver import Receiver, receive_all, receiver_of
from vllm.distributed.weight_sync.rendezvous import Rendezvous
from vllm.distributed.weight_sync.traffic import Copy
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger
from vllm.model_executor.parameters.load import ModuleWeights, find_weights
from vllm.model_executor.parameters.staged_update import LocalUpdate

logger = init_logger(__name__)


@dataclass
class WeightSyncInitInfo(WeightTransferInitInfo):
    """What a trainer's first rank tells an engine.

    Args:
        host: Where its store is.
        port: Where its store is.
        first_rank: The number of this engine's first rank among all engines' ranks.
        trainer_ranks: How many ranks the trainer has.
        staged: Whether an update is kept aside until all of it has come.
        timeout: Seconds for any wait.
        refuses: Why requests are to be refused until an update has come, a sentence;
            empty if the weights are served meanwhile.

    """

    host: str
    port: int
    first_rank: int
    trainer_ranks: int
    staged: bool
    timeout: float
    refuses: str = ""


@dataclass
class WeightSyncUpdateInfo(WeightTransferUpdateInfo):
    """The number of an update."""

    update: int


class WeightSyncEngine(WeightTransferEngine[WeightSyncInitInfo, WeightSyncUpdateInfo]):
    """Receives an update in a thread, beside serving, and commits it if all ranks can.

    What goes wrong is told to the trainer, and the old weights stay.
    """

    init_info_cls = WeightSyncInitInfo
    update_info_cls = WeightSyncUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._session: _Session | None = None

    def init_transfer_engine(self, init_info: WeightSyncInitInfo) -> None:
        """Meet a trainer. One that was met before is forgotten."""
        weights = find_weights(getattr(self.model, "module", self.model))
        if weights is None:
            raise TypeError(
                f"WeightSync updates registered callables; this model is a "
                f"{type(self.model).__name__}, which is none. "
                "Choose another backend in weight_transfer_config."
            )
        self.shutdown()
        parallel = self.parallel_config
        replica = parallel.data_parallel_index
        rank = torch.distributed.get_rank() % parallel.world_size
        rank += init_info.first_rank + replica * parallel.world_size
        if init_info.refuses:
            weights.update.require_update(init_info.refuses)
        frees = self.vllm_config.model_config.enable_sleep_mode
        self._session = _Session(weights, self.device, rank, init_info, frees)

    def start_weight_update(self) -> None:
        """Forget what is left of an update that was not finished."""
        self._get_session().discard()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Begin to receive, and return."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: WeightSyncUpdateInfo) -> None:
        self._get_session().start(update_info.update)

    def finish_weight_update(self) -> None:
        """Make what arrived the model's weights, if every rank has all of it."""
        if self._session is not None:
            self._session.finish()

    def shutdown(self) -> None:
        if self._session is not None:
            self._session.discard()
        self._session = None

    def _get_session(self) -> _Session:
        if self._session is None:
            raise RuntimeError(
                "No trainer has met this engine. Update weights by WeightSync.update()."
            )
        return self._session


class _Session:
    """The updates by one trainer."""

    def __init__(
        self,
        weights: ModuleWeights,
        device: torch.device,
        rank: int,
        info: WeightSyncInitInfo,
        frees: bool,
    ) -> None:
        self._info = info
        self._frees = frees  # the device's memory, between updates
        self._rank = rank
        self._device = device
        self._rendezvous = Rendezvous(info.host, info.port, info.timeout)
        manifest = manifest_of(weights.names, device)
        layouts = [shard.layout for shard in manifest.shards]
        self._local = LocalUpdate(weights, layouts, info.staged)
        self._receivers: list[Receiver | NetworkReceiver] | None = None
        self._thread: threading.Thread | None = None
        # Beside that on which the model serves. One for all updates: PyTorch gives the
        # memory of a stream only to the same stream again.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._update = 0
        self._rendezvous.set_manifest("engine", rank, manifest)

    def start(self, update: int) -> None:
        self._update = update
        self._thread = threading.Thread(
            target=self._receive, args=(update,), name="weight-sync", daemon=True
        )
        self._thread.start()

    def _receive(self, update: int) -> None:
        """Receive an update, and say whether all of it has come."""
        said = ""
        try:
            if self._stream is None:
                self._receive_all(update)
            else:
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    self._receive_all(update)
                    self._stream.synchronize()
        except Exception as error:
            logger.exception("Update %d of the weights did not arrive.", update)
            said = f"{type(error).__name__}: {error}"
        try:
            self._rendezvous.set(f"received/{update}/{self._rank}", said)
        except ConnectionError:
            logger.exception("Nobody is told of update %d.", update)

    @torch.no_grad()
    def _receive_all(self, update: int) -> None:
        if self._receivers is None:
            self._receivers = self._make_receivers()
        self._local.begin()
        receive_all(self._receivers, update, self._room)

    def _room(self, copy: Copy) -> torch.Tensor:
        return copy.of_target(self._local.room(copy.target_shard))

    def _make_receivers(self) -> list[Receiver | NetworkReceiver]:
        sources = self._rendezvous.get_manifests("trainer", self._info.trainer_ranks)
        receivers = [
            receiver_of(self._rank, source, manifest.location, self._rendezvous)
            for source, manifest in enumerate(sources)
        ]
        self._local.check_complete(
            (copy.target_shard, copy.sizes) for r in receivers for copy in r.copies
        )
        return [receiver for receiver in receivers if receiver.copies]

    def finish(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return  # never begun, or another trainer's
        thread.join(self._info.timeout)
        if thread.is_alive():
            raise TimeoutError(
                f"Update {self._update} of the weights has not arrived within "
                f"{self._info.timeout} s. Look at the trainer's log, or raise the "
                "timeout of WeightSync."
            )
        if self._rendezvous.get(f"verdict/{self._update}"):
            self._local.commit()
            if self._stream is not None:
                # The commit still copies from the rooms that the next update is
                # received into, so that update waits on the device, and no one here.
                serving = torch.cuda.current_stream(self._device)
                self._stream.wait_stream(serving)
                if self._frees:
                    serving.synchronize()
                    self._local.release()
        else:
            self._local.discard()

    def discard(self) -> None:
        if self._thread is not None:
            self._thread.join(self._info.timeout)
        self._thread = None
        self._local.discard()
