# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parameters of a factory that get no memory before they are loaded."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm.model_executor.models.callable_model.empty_parameters import (
    EmptyParameters,
    NeedsValuesError,
    any_values,
)
from vllm.model_executor.models.callable_model.precision import Float32Constants
from vllm.model_executor.models.plans.styles import match_styles
from vllm.model_executor.models.plans.tensor import divide, match_splits
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.placement import place
from vllm.utils.torch_utils import set_default_torch_dtype

CPU = torch.device("cpu")


def build(factory):
    mode = EmptyParameters(CPU)
    with mode:
        module = factory()
    return module, mode.problem(module)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 8, padding_idx=0)
        self.layer = nn.Linear(8, 16)
        self.scale = nn.Parameter(torch.randn(8) * 0.02)
        nn.init.trunc_normal_(self.layer.weight)
        self.head = nn.Linear(8, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.head.weight.marked = True
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("inv_freq", inv_freq, persistent=False)


def test_only_parameters_are_without_memory():
    module, problem = build(Plain)
    assert problem is None
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.head.weight is module.embedding.weight
    assert module.head.weight.marked
    assert torch.equal(module.inv_freq, Plain().inv_freq)


def test_a_factory_that_builds_on_the_meta_device():
    def factory():
        with torch.device("meta"):
            return Plain()

    module, problem = build(factory)
    assert problem is None
    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module.inv_freq, Plain().inv_freq)


def test_dtypes_are_those_of_a_build_with_memory():
    def factory():
        module = Plain()
        module.router = nn.Linear(4, 4, dtype=torch.float32)
        module.same = nn.Linear(4, 4)
        module.same.weight = module.router.weight
        module.norm = nn.LayerNorm(4).float()
        return module

    dtypes = []
    for mode in (None, EmptyParameters(CPU)):
        precision = Float32Constants(torch.bfloat16)
        with set_default_torch_dtype(torch.bfloat16), precision:
            if mode is None:
                module = factory()
            else:
                with mode:
                    module = factory()
        dtypes.append({name: t.dtype for name, t in module.named_parameters()})
        computed = [name for _, name in precision.computed(module)]
        assert computed == ["inv_freq"]
    assert dtypes[0] == dtypes[1]


def mask_of_a_parameter():
    module = nn.Linear(4, 4)
    module.register_buffer("mask", module.weight > 0)
    return module


def held_elsewhere():
    module = nn.Linear(4, 4)
    norm = module.weight.norm()
    module.register_forward_hook(lambda part, args, out: out / norm)
    return module


def random_features():
    module = nn.Linear(4, 4)
    module.register_buffer("features", torch.randn(4) * 2, persistent=False)
    return module


def shared_memory():
    module = nn.Linear(4, 4)
    module.other = nn.Linear(4, 4)
    module.other.weight = nn.Parameter(module.weight.data)
    return module


def own_loading():
    module = nn.Linear(4, 4)
    module.load_weights = lambda weights: None
    return module


@pytest.mark.parametrize(
    "factory, why",
    [
        (mask_of_a_parameter, "mask is computed from a parameter"),
        (held_elsewhere, "what is computed from a parameter"),
        (random_features, "random numbers that are in no checkpoint"),
        (shared_memory, "share their memory"),
        (own_loading, "load_weights of its own"),
    ],
)
def test_what_depends_on_values_is_noticed(factory, why):
    _, problem = build(factory)
    assert why in problem


def item():
    return nn.Linear(4, 4).weight.sum().item()


def added_to_zeros():  # PyTorch computes this, without a word
    return torch.zeros(4, 4).add_(nn.Linear(4, 4).weight)


def copied_with_a_view():
    torch.zeros(2, 4, 4)[0] = nn.Linear(4, 4).weight


def own_generator():
    nn.Linear(4, 4).weight.data.normal_(generator=torch.Generator())


def random_choice():
    nn.Linear(4, 4)
    return torch.randperm(8).tolist()


@pytest.mark.parametrize(
    "factory", [item, added_to_zeros, copied_with_a_view, own_generator, random_choice]
)
def test_values_are_not_read(factory):
    with pytest.raises((NeedsValuesError, RuntimeError)):
        build(factory)


def test_parameters_of_the_caller_keep_their_values():
    of_caller = nn.Parameter(torch.ones(4, 4))

    def factory():
        module = nn.Linear(4, 4)
        module.weight = of_caller
        return module

    module, problem = build(factory)
    assert problem is None
    assert module.weight is of_caller
    assert bool((of_caller == 1).all())


def test_values_for_a_trial_go_again():
    module, _ = build(Plain)
    parameters = list(module.parameters())
    place(module, CPU)
    with any_values(parameters):
        assert not any(bool(p.isnan().any()) for p in parameters)
        assert len(set(module.embedding.weight.flatten().tolist())) > 100
    assert all(bool(p.isnan().all()) for p in parameters)


class Peak(TorchDispatchMode):
    """The most bytes of tensors with memory at any time."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {s: n for s, n in self._alive.items() if not s.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def test_a_rank_never_holds_more_than_its_part_and_one_tensor():
    def factory():
        return nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(16))

    def peak(make):
        with Peak() as counted:
            module = make()
            styles = match_styles(module, {"*": "colwise"})
            context = ParallelContext(tensor_parallel_size=2)
            divide(module, styles, match_splits(module, styles), context)
            place(module, CPU)
        return counted.peak, sum(p.nbytes for p in module.parameters())

    one = 64 * 64 * 4
    most, part = peak(lambda: build(factory)[0])
    assert part == 8 * one
    assert most <= part + one
    most, _ = peak(factory)
    assert most >= 16 * one  # what is counted is there
