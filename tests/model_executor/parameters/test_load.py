# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Later loads, names, hooks and failures, of modules on one rank."""

import io
import pickle

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)

from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.load import weights_of

CONTEXT = ParallelContext()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embedding.weight


def state_of(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def random_state_of(module):
    return {name: torch.rand_like(t) for name, t in module.state_dict().items()}


def load(module, weights):
    if isinstance(weights, dict):
        weights = list(weights.items())
    return load_full_checkpoint(module, weights, CONTEXT)


@pytest.fixture
def served():
    """A module that was loaded once."""
    module = Tied()
    load(module, state_of(Tied()))
    return module


class TestLaterLoads:
    def test_one_tensor_at_a_time(self, served):
        new = state_of(Tied())
        for name, tensor in new.items():
            assert name in load(served, [(name, tensor)])
        for name, tensor in served.state_dict().items():
            assert torch.equal(tensor, new[name]), name

    @pytest.mark.parametrize("name", ["embedding.weight", "lm_head.weight"])
    def test_tied_weights_by_either_name(self, served, name):
        storage = served.embedding.weight.data_ptr()
        loaded = load(served, [(name, torch.full((6, 4), 3.0))])
        assert loaded == {"embedding.weight", "lm_head.weight"}
        assert bool((served.lm_head.weight == 3).all())
        assert served.lm_head.weight.data_ptr() == storage

    @pytest.mark.parametrize(
        ("name", "shape"), [("norm.weight", (5,)), ("unknown", (4,))]
    )
    def test_a_list_is_refused_before_anything_changes(self, served, name, shape):
        before = state_of(served)
        part = [("embedding.weight", torch.ones(6, 4)), (name, torch.ones(shape))]
        with pytest.raises(ValueError, match=name):
            load(served, part)
        for name, tensor in served.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        weights_of(served, CONTEXT).require_whole()

    def test_an_iterator_that_fails_at_once_changes_nothing(self, served):
        with pytest.raises(ValueError, match="1 surplus: unknown"):
            load(served, iter([("unknown", torch.ones(4))]))
        weights_of(served, CONTEXT).require_whole()

    def test_a_mixture_is_not_served_until_all_is_loaded(self, served):
        part = [("embedding.weight", torch.ones(6, 4)), ("unknown", torch.ones(4))]
        with pytest.raises(ValueError, match="1 surplus: unknown"):
            load(served, iter(part))
        weights = weights_of(served, CONTEXT)
        with pytest.raises(RuntimeError, match="mixture .* 1 surplus: unknown"):
            weights.require_whole()
        new = state_of(Tied())
        load(served, {"norm.weight": new["norm.weight"]})
        with pytest.raises(RuntimeError, match="mixture"):
            weights.require_whole()
        del new["norm.weight"], new["lm_head.weight"]
        load(served, new)
        weights.require_whole()

    def test_an_error_of_the_iterator_leaves_a_mixture(self, served):
        def weights():
            yield "embedding.weight", torch.ones(6, 4)
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            load(served, weights())
        with pytest.raises(RuntimeError, match="mixture .* CUDA out of memory"):
            weights_of(served, CONTEXT).require_whole()

    def test_a_complete_load_names_what_is_missing(self, served):
        weights = weights_of(served, CONTEXT)
        with pytest.raises(ValueError, match="1 missing: norm.bias"):
            state = {n: t for n, t in state_of(served).items() if n != "norm.bias"}
            weights.load(state.items(), "here", complete=True)
        weights.require_whole()

    def test_random_weights_may_be_replaced_in_parts(self):
        module = Tied()
        weights_of(module, CONTEXT).finish_first_load()  # load_format="dummy"
        load(module, [("norm.weight", torch.full((4,), 2.0))])
        assert bool((module.norm.weight == 2).all())


class TestTied:
    def test_equal_tensors_of_both_names(self):
        load(Tied(), state_of(Tied()))

    @pytest.mark.parametrize("lazy", [False, True])
    def test_different_tensors_are_named(self, lazy):
        weights = [*random_state_of(Tied()).items()]
        message = "1 different tensors for one parameter: embedding.weight and lm_head"
        with pytest.raises(ValueError, match=message):
            load(Tied(), iter(weights) if lazy else weights)

    def test_a_name_that_comes_twice(self, served):
        twice = [("norm.bias", torch.zeros(4)), ("norm.bias", torch.ones(4))]
        with pytest.raises(ValueError, match="norm.bias and norm.bias"):
            load(served, twice)

    def test_parameters_of_one_storage(self):
        def build():
            module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
            module["b"].weight.data = module["a"].weight.data
            return module

        weights = state_of(build())
        del weights["a.weight"]
        module = build()
        assert "a.weight" in load(module, weights)
        assert torch.equal(module["a"].weight, weights["b.weight"])

    def test_shared_buffers(self):
        def build():
            module = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
            module["a"].register_buffer("table", torch.rand(3))
            module["b"].register_buffer("table", module["a"].table)
            return module

        module = build()
        assert "a.table" in load(module, {"b.table": torch.ones(3)})
        assert bool((module["a"].table == 1).all())


class TestNames:
    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"_orig_mod.{name}",
            lambda name: f"module.{name}",
            lambda name: f"module._orig_mod.{name}",
            lambda name: name.replace("norm.", "norm._fsdp_wrapped_module."),
        ],
    )
    def test_wrappers_in_the_checkpoint(self, rename):
        weights = state_of(Tied())
        module = Tied()
        load(module, {rename(name): tensor for name, tensor in weights.items()})
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, weights[name]), name

    def test_wrappers_in_the_module(self):
        weights = state_of(Tied())
        module = Tied()
        module.norm = torch.compile(module.norm)
        load(module, weights)
        assert torch.equal(module.norm._orig_mod.weight, weights["norm.weight"])

    def test_a_module_of_that_name_is_not_a_wrapper(self):
        def build():
            return nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})

        weights = state_of(build())
        module = build()
        load(module, weights)
        assert torch.equal(module["module"].weight, weights["module.weight"])

    def test_an_ambiguous_name(self):
        module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
        module["module"] = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
        with pytest.raises(ValueError, match="_orig_mod.a.weight may be a.weight or"):
            load(module, {"_orig_mod.a.weight": torch.ones(2, 2)})

    def test_activation_checkpointing(self):
        weights = state_of(Tied())
        module = Tied()
        module.norm = checkpoint_wrapper(module.norm)
        loaded = load(module, weights)
        assert {name for name, _ in module.named_parameters()} <= loaded
        for name, parameter in module.named_parameters():
            load(module, [(name, torch.zeros_like(parameter))])
        assert not any(bool(p.any()) for p in module.parameters())


class Fused(nn.Module):
    """One weight here, two in checkpoints."""

    def __init__(self, saves_two=True):
        super().__init__()
        self.w = nn.Parameter(torch.rand(4, 2))
        self.norm = nn.LayerNorm(2)
        if saves_two:
            self.register_state_dict_post_hook(self.split)
        self.register_load_state_dict_pre_hook(self.fuse)

    @staticmethod
    def split(module, state, prefix, _):
        w = state.pop(f"{prefix}w")
        state |= {f"{prefix}a": w[:2].clone(), f"{prefix}b": w[2:].clone()}

    @staticmethod
    def fuse(module, state, prefix, *_):
        if f"{prefix}a" in state:
            parts = [state.pop(f"{prefix}{name}") for name in "ab"]
            state[f"{prefix}w"] = torch.cat(parts)


class TestHooks:
    def build(self, saves_two=True):
        return nn.ModuleDict({"f": Fused(saves_two), "out": nn.Linear(2, 2)})

    def weights(self):
        return random_state_of(self.build())

    @pytest.mark.parametrize("saves_two", [True, False])
    def test_a_submodule_loads_itself(self, saves_two):
        module, weights = self.build(saves_two), self.weights()
        assert "f.a" in weights
        loaded = load(module, weights)
        assert {name for name, _ in module.named_parameters()} <= loaded
        fused = torch.cat([weights["f.a"], weights["f.b"]])
        assert torch.equal(module["f"].w, fused)
        assert torch.equal(module["out"].weight, weights["out.weight"])

    def test_hooks_of_the_root(self):
        weights = random_state_of(Fused())
        module = Fused()
        load(module, weights)
        assert torch.equal(module.w[:2], weights["a"])

    def test_what_is_missing_is_named(self):
        weights = self.weights()
        del weights["f.norm.bias"]
        with pytest.raises(
            ValueError, match="(?s)f, whose state dict has hooks.*norm.bias"
        ):
            load(self.build(), weights)
        only_out = {n: t for n, t in weights.items() if n.startswith("out")}
        with pytest.raises(ValueError, match="4 missing: f.a, f.b, f.norm.bias"):
            load(self.build(), only_out)

    def test_a_later_part(self):
        module = self.build()
        load(module, self.weights())
        before = state_of(module)
        part = {"out.bias": torch.ones(2), "f.norm.weight": torch.ones(2)}
        with pytest.raises(ValueError, match="whose state dict has hooks"):
            load(module, part)
        weights_of(module, CONTEXT).require_whole()
        assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
        new = self.weights()
        load(module, {n: t for n, t in new.items() if n.startswith("f.")})
        assert torch.equal(module["f"].w[2:], new["f.b"])


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


class TestExtraState:
    def test_the_module_gets_its_own(self):
        module = nn.Sequential(Counter())
        load(module, {"0.weight": torch.ones(2), "0._extra_state": {"count": 3}})
        assert module[0].count == 3

    def test_missing(self):
        with pytest.raises(ValueError, match="1 missing: 0._extra_state"):
            load(nn.Sequential(Counter()), {"0.weight": torch.ones(2)})

    def test_of_nobody(self):
        weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        load(nn.Linear(2, 2), weights | {"x._extra_state": io.BytesIO()})
        with pytest.raises(ValueError, match="1 surplus: x._extra_state"):
            load(nn.Linear(2, 2), weights | {"x._extra_state": torch.ones(1)})

    def test_megatrons_are_skipped(self):
        class Layer(Counter):
            pass

        Layer.get_extra_state = lambda self: None
        Layer.get_extra_state.__module__ = "megatron.core.tensor_parallel.layers"
        for extra in ({}, {"0._extra_state": io.BytesIO()}):
            load(nn.Sequential(Layer()), {"0.weight": torch.ones(2)} | extra)


class TestReading:
    def failing(self, error):
        yield "embedding.weight", torch.ones(6, 4)
        raise error

    @pytest.mark.parametrize(
        "error",
        [
            SafetensorError("Error while deserializing header"),
            EOFError("Ran out of input"),
            pickle.UnpicklingError("pickle data was truncated"),
            RuntimeError("PytorchStreamReader failed reading zip archive"),
        ],
    )
    def test_a_truncated_file(self, error):
        with pytest.raises(ValueError, match="cannot be read: .* truncated one"):
            load(Tied(), self.failing(error))

    def test_a_pickle_of_code(self):
        error = pickle.UnpicklingError("Weights only load failed")
        with pytest.raises(ValueError, match="is not plain tensors, and is not run"):
            load(Tied(), self.failing(error))

    @pytest.mark.parametrize(
        "error", [RuntimeError("NCCL error"), torch.OutOfMemoryError("out of memory")]
    )
    def test_other_errors_pass(self, error):
        with pytest.raises(type(error), match=str(error)):
            load(Tied(), self.failing(error))
