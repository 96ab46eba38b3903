# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's own engines for weight transfer, with the transport faked."""

from types import SimpleNamespace

import pytest
import torch
from update_models import addresses, load_sparse, shuffled

from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import ipc_engine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.m2n_common import M2NParamMeta
from vllm.distributed.weight_transfer.m2n_engine import M2NWeightTransferEngine
from vllm.distributed.weight_transfer.m2n_layout import M2NDestination
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

pytestmark = pytest.mark.engine

GPU = SimpleNamespace(uuid="gpu", synchronize=lambda: None, destroy=lambda: None)


class Trainer:
    """Stands for a communicator, and gives tensors in the order they are asked for."""

    comm = 1

    def __init__(self, weights) -> None:
        self.weights = [tensor for _, tensor in weights]

    def broadcast(self, tensor, src, stream):
        tensor.copy_(self.weights.pop(0))

    def destroy(self):
        pass


def description(weights):
    return {
        "names": [name for name, _ in weights],
        "dtype_names": [str(tensor.dtype).split(".")[-1] for _, tensor in weights],
        "shapes": [list(tensor.shape) for _, tensor in weights],
    }


class Nccl(NCCLWeightTransferEngine):
    def part(self, weights):
        self.model_update_group = Trainer(weights)
        return description(weights)


class NcclPacked(Nccl):
    """One call for each buffer."""

    def receive_weights(self, update_info):
        sent = zip(update_info.names, self.model_update_group.weights, strict=True)
        self.model.load_weights(list(sent))


class Ipc(IPCWeightTransferEngine):
    def part(self, weights):
        handles = [{GPU.uuid: (tensor, *[None] * 6)} for _, tensor in weights]
        return description(weights) | {"ipc_handles": handles}


class M2n(M2NWeightTransferEngine):
    """Some parameters are written directly, others loaded from an iterator."""

    def part(self, weights):
        self.model_update_group, self._handle = Trainer([]), GPU
        self._uses_load_weights = True
        self._sent = dict(weights)
        self._metas = [
            M2NParamMeta(name, tensor.dtype, tuple(tensor.shape), (-1, -1))
            for name, tensor in weights
        ]
        self._index = {name: i for i, (name, _) in enumerate(weights)}
        own = dict(self._default_model.named_parameters())
        self._parameter_destinations = [
            M2NDestination(
                name,
                (-1, -1),
                own[name].data if "norm" in name else None,
            )
            for name, _ in weights
        ]
        return {"names": [name for name, _ in weights]}

    def _reshard(self, comm, stream, meta, placements, buffer):
        buffer.copy_(self._sent[meta.name])


@pytest.fixture
def served(serve, monkeypatch):
    """An engine in this process, whose transfers need no GPU."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: GPU)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda t, *_: t)
    return serve("plain")


def test_each_engine(served):
    old, new = served.old, served.new
    before = served.apply(addresses)
    worker = served.llm.llm_engine.model_executor.driver_worker.worker
    config = WeightTransferConfig()
    for kind, weights in (
        (Nccl, new),
        (NcclPacked, old),
        (Ipc, new),
        (M2n, old),
    ):
        engine = kind(config, worker.vllm_config, worker.device, worker.get_model())
        worker.weight_transfer_engine = engine
        items = shuffled(weights)
        served.llm.start_weight_update()
        for part in (items[:7], items[7:]):
            served.llm.update_weights({"update_info": engine.part(part)})
        served.llm.finish_weight_update()
        served.assert_serves(weights)

    served.apply(load_sparse, weights=shuffled(new), old=old)
    served.assert_serves(new)
    assert served.apply(addresses) == before


def test_in_the_format_of_kernels(served):
    """`is_checkpoint_format=False` copies what is this rank's already."""
    own = [(n, t) for n, t in served.new.items() if n != "scale"]
    before = served.apply(addresses)
    served.reload(weights_iterator=iter(own), is_checkpoint_format=False)
    assert served.apply(addresses) == before
    served.assert_serves({**served.new, "scale": served.old["scale"]})

    served.reload(weights_path=str(served.folder / "old"))
    wrong = [*own[:3], (own[3][0], torch.ones(3))]
    with pytest.raises(RuntimeError, match="size of tensor"):
        served.reload(weights_iterator=iter(wrong), is_checkpoint_format=False)
    served.assert_refuses("size of tensor")
    served.reload(weights_path=str(served.folder / "old"))
    served.assert_serves(served.old)
