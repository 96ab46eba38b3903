# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How `batch_invariant` turns vLLM's mode on and off.

vLLM's operators are for GPUs. On a CPU the switch is tested with a stand-in for the
module that registers them, and the operators of a CPU by themselves.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import vllm.envs as envs
from vllm.training import batch_invariance
from vllm.training.batch_invariance import batch_invariant, token_log_probs


class Upstream(SimpleNamespace):
    """What the mode's module of vLLM 0.26 does; later ones leave torch.bmm alone."""

    def __init__(self) -> None:
        super().__init__(_batch_invariant_MODE=False, _batch_invariant_LIB=None)
        self.destroyed = 0

    def enable_batch_invariant_mode(self) -> None:
        if self._batch_invariant_MODE:
            return
        self._batch_invariant_MODE = True
        self._batch_invariant_LIB = SimpleNamespace(_destroy=self._destroy)
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.bmm = replaced_bmm

    def _destroy(self) -> None:
        self.destroyed += 1


def replaced_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise AssertionError("has no gradient")


def state() -> tuple[object, ...]:
    matmul = torch.backends.cuda.matmul
    return (
        envs.VLLM_BATCH_INVARIANT,
        *map(os.environ.get, batch_invariance.ENVIRONMENT),
        torch.bmm,
        matmul.allow_bf16_reduced_precision_reduction,
    )


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    upstream = Upstream()
    monkeypatch.setattr(batch_invariance, "_upstream", lambda: upstream)
    monkeypatch.setattr(batch_invariance, "use_cpu_operators", lambda: None)
    for name in batch_invariance.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    envs.disable_envs_cache()
    bmm = torch.bmm
    yield upstream
    envs.disable_envs_cache()
    torch.bmm = bmm


@pytest.mark.parametrize("engine_before", [False, True])
def test_it_is_on_inside_and_as_before_outside(
    upstream: Upstream, engine_before: bool, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """Also where an engine has had vLLM keep what it read of the environment."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "7")
    if engine_before:
        envs.enable_envs_cache()
    before = state()
    with pytest.raises(KeyError), batch_invariant():
        assert envs.VLLM_BATCH_INVARIANT and upstream._batch_invariant_MODE
        assert envs._is_envs_cache_enabled() == engine_before
        assert torch.bmm is torch._C._VariableFunctions.bmm
        raise KeyError
    assert state() == before and not envs.VLLM_BATCH_INVARIANT
    assert envs._is_envs_cache_enabled() == engine_before
    assert not upstream._batch_invariant_MODE and upstream.destroyed == 1
    warned = "was started in this process" in caplog.text
    assert warned == engine_before


def test_blocks_of_several_threads_end_with_the_last(upstream: Upstream) -> None:
    entered, leave = threading.Event(), threading.Event()
    before = state()

    def train() -> None:
        with batch_invariant():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=train)
    with batch_invariant():
        thread.start()
        assert entered.wait(30)
        with batch_invariant():
            pass
        assert envs.VLLM_BATCH_INVARIANT
    assert envs.VLLM_BATCH_INVARIANT and upstream.destroyed == 0
    leave.set()
    thread.join()
    assert state() == before and upstream.destroyed == 1


def test_the_mode_of_an_engine_stays(upstream: Upstream, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    upstream.enable_batch_invariant_mode()
    envs.enable_envs_cache()
    before = state()
    with batch_invariant():
        assert torch.bmm is torch._C._VariableFunctions.bmm
    assert state() == before and upstream.destroyed == 0


def test_an_engine_started_inside_keeps_it_on(upstream: Upstream) -> None:
    with batch_invariant():
        envs.enable_envs_cache()  # as an engine does when it has started
    assert envs.VLLM_BATCH_INVARIANT and upstream.destroyed == 0
    os.environ.pop("VLLM_BATCH_INVARIANT")


def test_the_earlier_path_has_the_same_functions() -> None:
    from vllm.model_executor.layers import batch_invariant_training as earlier

    assert earlier.__all__ == batch_invariance.__all__
    for name in earlier.__all__:
        assert getattr(earlier, name) is getattr(batch_invariance, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_do_not_depend_on_their_batch_on_a_cpu(dtype, bias) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 768, bias=bias, dtype=dtype)
    hidden = torch.randn(300, 1024, dtype=dtype)
    labels = torch.randint(768, (300,))
    with batch_invariant():
        whole = layer(hidden)
        log_probs = token_log_probs(whole, labels)
        for rows in (1, 2, 7, 16, 33, 128):
            part = layer(hidden[:rows])
            assert torch.equal(part, whole[:rows]), rows
            part = token_log_probs(part, labels[:rows])
            assert torch.equal(part, log_probs[:rows]), rows
        assert torch.equal(layer(hidden[None])[0], whole)
        log_probs.sum().backward()
        assert layer.weight.grad.isfinite().all()
        counts = torch.arange(6).view(2, 3)
        assert torch.equal(counts @ counts.T, torch.tensor([[5, 14], [14, 50]]))
    exact = hidden.double() @ layer.weight.double().T
    exact += layer.bias.double() if bias else 0
    torch.testing.assert_close(whole.double(), exact, atol=1e-4, rtol=2**-8)


ROWS = """
import torch
import vllm.envs as envs
from vllm.training.batch_invariance import (
    batch_invariant,
    token_log_probs,
)

envs.enable_envs_cache()  # as an engine does when it has started
with batch_invariant():
    assert envs.VLLM_BATCH_INVARIANT
    torch.manual_seed(0)
    bfloat16 = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.randn(2048, 4096, **bfloat16).requires_grad_()
    hidden = torch.randn(777, 2048, **bfloat16)
    labels = torch.randint(4096, (777,), device="cuda")
    whole = token_log_probs(hidden @ weight, labels)
    for rows in (1, 5, 128, 500):
        part = token_log_probs(hidden[:rows] @ weight, labels[:rows])
        assert torch.equal(part, whole[:rows]), rows
    products = torch.bmm(hidden[None], weight[None])[0]
    assert torch.equal(torch.bmm(hidden[None, :3], weight[None])[0], products[:3])
    (whole.sum() + products.sum()).backward()
    assert weight.grad.isfinite().all()
assert not envs.VLLM_BATCH_INVARIANT
"""


@pytest.mark.gpu
def test_rows_do_not_depend_on_their_batch_after_an_engine_was_started() -> None:
    # A process of its own, as cuBLAS reads its settings before the first product.
    subprocess.run([sys.executable, "-c", ROWS], check=True, timeout=300)
