# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Later loads and vLLM's layerwise reload, of each kind of shards and of packed layers.

What a reload has to give is what the same weights give a module that is new.
"""

from contextlib import contextmanager

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    initialize_online_processing,
)
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.model_executor.parameters.layout import MARK, layout_of
from vllm.model_executor.parameters.load import weights_of

HIDDEN = 32
TOKENS = 10


class Scaled(ReplicatedLinear):
    """As vLLM's layers do: a buffer that is not for checkpoints."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("_k_scale", torch.ones(()))


class VllmLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = VocabParallelEmbedding(TOKENS, HIDDEN)
        self.qkv = QKVParallelLinear(HIDDEN, 8, 4, 1, v_head_size=16)
        self.up = ColumnParallelLinear(HIDDEN, 64)
        self.down = RowParallelLinear(64, HIDDEN)
        self.norm = Scaled(HIDDEN, HIDDEN)
        self.plain = nn.Linear(HIDDEN, HIDDEN)
        self.head = ParallelLMHead(TOKENS, HIDDEN)
        self.head.weight = self.embedding.weight

    @torch.no_grad()
    def outputs(self):
        x = self.embedding(torch.arange(TOKENS))
        qkv, _ = self.qkv(x)
        x, _ = self.down(self.up(x)[0])
        x = self.plain(self.norm(x)[0])
        return qkv, x, self.head.quant_method.apply(self.head, x)


VLLM_SHAPES = {
    "embedding.weight": (TOKENS, HIDDEN),
    "qkv.weight": (8 * 4 + 8 + 16, HIDDEN),
    "qkv.bias": (8 * 4 + 8 + 16,),
    "up.weight": (64, HIDDEN),
    "up.bias": (64,),
    "down.weight": (HIDDEN, 64),
    "down.bias": (HIDDEN,),
    "norm.weight": (HIDDEN, HIDDEN),
    "norm.bias": (HIDDEN,),
    "plain.weight": (HIDDEN, HIDDEN),
    "plain.bias": (HIDDEN,),
}


def random_weights(shapes, seed):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device="cpu")
        for name, shape in shapes.items()
    }


def served(build, weights, context):
    """A module as vLLM has it once it is loaded."""
    model = build()
    weights_of(model, context)
    record_metadata_for_reloading(model)
    load_full_checkpoint(model, iter(weights.items()), context)
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)
    return model


@contextmanager
def reload(model):
    initialize_layerwise_reload(model)
    yield
    finalize_layerwise_reload(model, None)


def update(model, weights, context):
    return weights_of(model, context).load_model(model, weights, "new")


def assert_same(model, expected):
    for actual, wanted in zip(model.outputs(), expected.outputs(), strict=True):
        assert torch.equal(actual, wanted)


def vllm_layers(context):
    old, new = random_weights(VLLM_SHAPES, 0), random_weights(VLLM_SHAPES, 1)
    before = served(VllmLayers, old, context)
    after = served(VllmLayers, new, context)
    model = served(VllmLayers, old, context)
    assert_same(model, before)

    for name in reversed(new):  # biases before their weights
        update(model, [(name, new[name])], context)
    assert_same(model, after)

    bad = list(old.items()) + [("up.bias", torch.ones(3))]
    with pytest.raises(ValueError, match=r"mis-shaped: up.bias \[3\], expected \[64\]"):
        update(model, bad, context)
    assert_same(model, after)

    with reload(model):
        update(model, iter(old.items()), context)
    assert_same(model, before)

    with reload(model):  # as vLLM's weight transfer does
        for name, tensor in new.items():
            update(model, [(name, tensor)], context)
    assert_same(model, after)

    initialize_layerwise_reload(model)
    with pytest.raises(ValueError, match="mis-shaped: up.bias"):
        update(model, bad, context)
    assert_same(model, after)

    with reload(model):  # one name of the tied weights, or the other
        update(model, [("head.weight", old["embedding.weight"])], context)
    update(model, [("embedding.weight", old["embedding.weight"])], context)
    x = torch.eye(HIDDEN)
    logits = model.head.quant_method.apply(model.head, x)
    assert torch.equal(logits, before.head.quant_method.apply(before.head, x))

    initialize_layerwise_reload(model)
    del new["plain.bias"]
    with pytest.raises(ValueError, match="1 missing: plain.bias"):
        update(model, iter(new.items()), context)
    with pytest.raises(RuntimeError, match="mixture"):
        weights_of(model, context).require_whole()
    with reload(model):
        update(model, iter(old.items()), context)
    weights_of(model, context).require_whole()
    assert_same(model, before)


class Own(VllmLayers):
    """It loads its own weights."""

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights)


def own_load_weights(context):
    old, new = random_weights(VLLM_SHAPES, 0), random_weights(VLLM_SHAPES, 1)
    after = served(VllmLayers, new, context)
    model = served(Own, old, context)
    for name, tensor in new.items():
        assert update(model, [(name, tensor)], context) == {name}
    assert_same(model, after)
    with pytest.raises(ValueError, match="no module or parameter named"):
        update(model, [("unknown", torch.ones(1))], context)
    assert_same(model, after)
    with pytest.raises(RuntimeError, match="mixture"):
        weights_of(model, context).require_whole()
    with reload(model):
        update(model, iter(new.items()), context)
    weights_of(model, context).require_whole()
    assert_same(model, after)


class Online(LinearMethodBase):
    """Quantizes what it loads, as vLLM's online methods: the weight waits on meta."""

    uses_meta_device = True

    def create_weights(self, layer, *args, **kwargs):
        UnquantizedLinearMethod().create_weights(layer, *args, **kwargs)
        meta = layer.weight.data.to("meta")
        meta.__class__ = type(layer.weight)
        meta.__dict__.update(vars(layer.weight))
        layer.weight = meta
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer):
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        layer._already_called_process_weights_after_loading = True
        scale = layer.weight.abs().amax() / 127
        rounded = (layer.weight / scale).round().to(torch.int8)
        layer.weight = nn.Parameter(rounded, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight * layer.weight_scale, bias)


class OnlineConfig:
    online_quantization_config = None

    def get_quant_method(self, layer, prefix):
        return Online()


class Quantized(nn.Module):
    """Linear layers that quantize, one without a bias, between plain ones."""

    def __init__(self):
        super().__init__()
        options = {"quant_config": OnlineConfig(), "return_bias": False}
        self.plain = nn.Linear(HIDDEN, HIDDEN)
        self.up = ColumnParallelLinear(HIDDEN, 64, **options)
        self.down = RowParallelLinear(64, HIDDEN, bias=False, **options)

    @torch.no_grad()
    def outputs(self):
        return (self.down(self.up(self.plain(torch.eye(HIDDEN)))),)


QUANTIZED_SHAPES = {
    "plain.weight": (HIDDEN, HIDDEN),
    "plain.bias": (HIDDEN,),
    "up.weight": (64, HIDDEN),
    "up.bias": (64,),
    "down.weight": (HIDDEN, 64),
}


def online_quantization(context):
    old, new = (random_weights(QUANTIZED_SHAPES, seed) for seed in (0, 1))
    before = served(Quantized, old, context)
    after = served(Quantized, new, context)
    model = served(Quantized, old, context)
    assert model.up.weight.dtype == model.down.weight.dtype == torch.int8
    assert not torch.equal(before.outputs()[0], after.outputs()[0])
    assert_same(model, before)
    addresses = {name: t.data_ptr() for name, t in model.named_parameters()}

    with reload(model):
        update(model, iter(new.items()), context)
    assert_same(model, after)
    for layer in ("down", "up", "plain"):
        part = [(n, old[n]) for n in reversed(old) if n.startswith(f"{layer}.")]
        update(model, part, context)
    assert_same(model, before)
    with pytest.raises(ValueError, match="up.bias came without up.weight"):
        update(model, [("up.bias", new["up.bias"])], context)
    assert_same(model, before)
    with reload(model):  # as vLLM's weight transfer does with its buffers
        for layer in ("down", "up", "plain"):
            part = [(n, t) for n, t in new.items() if n.startswith(f"{layer}.")]
            update(model, part, context)
    assert_same(model, after)
    assert {n: t.data_ptr() for n, t in model.named_parameters()} == addresses


class Kinds(nn.Module):
    """Plain, divided as a plan or Megatron divides, and DTensors."""

    def __init__(self, context):
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.plain.register_buffer("scale", torch.zeros(3))
        ranks = context.tensor_parallel_size
        self.marked = nn.Linear(8, 24 // ranks, bias=False)
        setattr(self.marked.weight, MARK, True)
        self.marked.weight.partition_dim = 0
        self.marked.weight.partition_stride = 2
        self.dtensors = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
        mesh = context.device_mesh()["tp"]
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(self.dtensors, mesh, plan)
        odd = torch.zeros(3, 5)  # uneven shards
        self.odd = nn.Parameter(distribute_tensor(odd, mesh, [Shard(1)]))
        self.same = nn.Parameter(distribute_tensor(odd, mesh, [Replicate()]))


KIND_SHAPES = {
    "plain.weight": (8, 8),
    "plain.bias": (8,),
    "plain.scale": (3,),
    "marked.weight": (24, 8),
    "dtensors.0.weight": (12, 8),
    "dtensors.0.bias": (12,),
    "dtensors.1.weight": (8, 12),
    "dtensors.1.bias": (8,),
    "odd": (3, 5),
    "same": (3, 5),
}


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def kinds(context):
    def build():
        return Kinds(context)

    old, new = random_weights(KIND_SHAPES, 0), random_weights(KIND_SHAPES, 1)
    model = served(build, old, context)
    storages = {n: local(t).data_ptr() for n, t in model.state_dict().items()}

    def assert_holds(weights):
        for name, tensor in model.state_dict(keep_vars=True).items():
            owner = model.get_submodule(name.rpartition(".")[0])
            layout = layout_of(tensor, owner, context)
            assert layout.holds(local(tensor), weights[name]), name
            assert local(tensor).data_ptr() == storages[name], name
        fresh = served(build, weights, context).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(local(tensor), local(fresh[name])), name

    assert_holds(old)
    # Not all of the layouts' whole values, but this rank's are in the local tensor.
    whole = distribute_tensor(
        old["odd"], context.device_mesh()["tp"], [Shard(1)], src_data_rank=None
    )
    assert torch.equal(local(model.odd), local(whole))
    with reload(model):
        update(model, iter(new.items()), context)
    assert_holds(new)
    for name, tensor in old.items():
        update(model, [(name, tensor)], context)
    assert_holds(old)
    initialize_layerwise_reload(model)
    with pytest.raises(ValueError, match="1 surplus: unknown"):
        update(model, iter([("unknown", torch.ones(1))]), context)
    weights_of(model, context).require_whole()
    assert_holds(old)


def all_kinds(context):
    """Together, because starting the ranks takes most of the time."""
    kinds(context)
    vllm_layers(context)
    own_load_weights(context)
    online_quantization(context)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_later_loads(tensor_parallel_size, tmp_path):
    run_ranks(all_kinds, tmp_path, tensor_parallel_size)
