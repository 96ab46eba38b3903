# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""When a registered model gives up being compiled, and when it does not."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import vllm.envs as envs
from vllm.compilation.registered_model import (
    add_to_compile_hash,
    compile_if_possible,
    true_on_all_ranks,
)
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.parallel_context import ParallelContext

# What the operator below does in this process.
state = SimpleNamespace(calls=0, error=None)


@torch.library.custom_op("fall_back_test::step", mutates_args=())
def step(x: torch.Tensor) -> torch.Tensor:
    state.calls += 1
    if state.error is not None:
        raise state.error
    return x + 1


@step.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Traceable(nn.Module):
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return step(torch.stack([input_ids, positions], -1).float())


class Untraceable(Traceable):
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if int(positions.sum()) < 0:  # depends on data
            raise ValueError("negative positions")
        return super().forward(input_ids, positions)


def model_of(module: nn.Module) -> Any:
    """`module` in a wrapper like CallableModelWrapper, compiled if that is possible."""

    class Model(nn.Module):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__()
            self.module = module
            add_to_compile_hash(module, vllm_config)

        def forward(
            self,
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            intermediate_tensors: torch.Tensor | None = None,
            inputs_embeds: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return self.module(input_ids, positions)

    config = VllmConfig(
        compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    )
    # A CPU would choose another mode, in which vLLM does not find its code again.
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.compile_sizes = []
    with set_current_vllm_config(config):
        return compile_if_possible(Model)(vllm_config=config)


def run(model: Any, tokens: int = 4, sign: int = 1) -> torch.Tensor:
    ids = torch.arange(tokens)
    with torch.no_grad(), set_current_vllm_config(model.vllm_config):
        return model(ids, sign * ids)


def reference(tokens: int = 4) -> torch.Tensor:
    ids = torch.arange(tokens)
    return torch.stack([ids, ids], -1) + 1.0


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """vLLM's groups for one process, and a cache of compiled code of its own."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    vars(state).update(calls=0, error=None)
    torch._dynamo.reset()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture(params=["1", "0"], ids=["aot", "jit"])
def aot(request, one_rank, monkeypatch) -> bool:
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", request.param)
    return envs.VLLM_USE_AOT_COMPILE


def test_an_error_in_the_first_step_is_raised_once(aot) -> None:
    model = model_of(Traceable())
    state.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="^out of memory$"):
        run(model)
    assert state.calls == 1
    state.error = None
    assert run(model).equal(reference())
    assert not model.do_not_compile


def test_an_error_in_a_later_step_is_raised_once(aot) -> None:
    model = model_of(Traceable())
    for tokens in (4, 7, 9):
        assert run(model, tokens).equal(reference(tokens))
    state.error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="^out of memory$") as caught:
        run(model)
    assert caught.value is state.error
    assert state.calls == 4
    assert not model.do_not_compile


def test_an_error_after_a_warm_start_is_raised_once(one_rank) -> None:
    run(model_of(Traceable()))
    model = model_of(Traceable())
    assert run(model).equal(reference())
    assert model.was_aot_compile_fn_loaded_from_disk
    state.calls, state.error = 0, RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="^out of memory$"):
        run(model)
    assert state.calls == 1
    assert not model.do_not_compile


def test_what_cannot_be_traced_runs_eagerly(aot, monkeypatch, caplog) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    model = model_of(Untraceable())
    assert run(model).equal(reference())
    assert "Model runs without torch.compile, which cannot trace it (" in caplog.text
    assert model.do_not_compile
    with pytest.raises(ValueError, match="^negative positions$") as caught:
        run(model, sign=-1)
    assert caught.value.__context__ is None


def test_an_error_of_the_model_while_it_is_traced_is_its_own(aot) -> None:
    class Wrong(nn.Module):
        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
            raise ValueError("no such layer")

    with pytest.raises(ValueError, match="^no such layer$") as caught:
        run(model_of(Wrong()))
    assert caught.value.__context__ is None


class HidesDTensor(torch.Tensor):
    """A tensor of another class with a DTensor in an attribute."""


@pytest.mark.parametrize("where", ["parameter", "buffer", "attribute", "inside"])
def test_dtensors_are_found_wherever_they_are(one_rank, where) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dtensor = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))
    module = Traceable()
    if where == "parameter":
        module.weight = nn.Parameter(dtensor)
    elif where == "buffer":
        module.register_buffer("weight", dtensor)
    elif where == "attribute":
        module.weights = {"first": [dtensor]}
    else:
        module.weight = nn.Parameter(torch.ones(2).as_subclass(HidesDTensor))
        module.weight.inner = dtensor
    assert model_of(module).do_not_compile


def one_rank_fails(parallel_context: ParallelContext) -> None:
    rank = parallel_context.tensor_parallel_rank
    model = model_of(Untraceable() if rank == 1 else Traceable())
    assert run(model).equal(reference())
    assert model.do_not_compile
    assert state.calls == 1
    # With DTensors, say, on one rank only.
    module = Traceable()
    if rank == 1:
        module.weight = torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)
    assert model_of(module).do_not_compile
    # One has its code in the cache, and the other compiles it.
    model = model_of(Traceable())
    run(model)
    assert not model.do_not_compile
    state.error = RuntimeError("out of memory") if rank == 1 else None
    state.calls = 0
    if rank == 1:
        with pytest.raises(RuntimeError, match="^out of memory$"):
            run(model)
    else:
        assert run(model).equal(reference())
    assert state.calls == 1
    assert not model.do_not_compile


def test_all_ranks_decide_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    run_ranks(one_rank_fails, tmp_path, tensor_parallel_size=2)


def one_stage_fails(parallel_context: ParallelContext) -> None:
    assert true_on_all_ranks(True)
    assert not true_on_all_ranks(parallel_context.is_first_stage)


def test_all_stages_decide_together(tmp_path: Path) -> None:
    run_ranks(one_stage_fails, tmp_path, pipeline_parallel_size=2)
