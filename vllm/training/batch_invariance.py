# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's batch-invariant operators in a training process, with gradients.

An engine started with `VLLM_BATCH_INVARIANT=1` and a trainer inside `batch_invariant()`
compute the same bits for the same tokens, whatever else is in their batches. This was
tried on H100 and H200 GPUs. On a CPU the products of matrices are replaced by ours.
"""

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger(__name__)

__all__ = ["batch_invariant", "token_log_probs"]

# vLLM moved the module after 0.26.
MODULES = (
    "vllm.model_executor.determinism.batch_invariant",
    "vllm.model_executor.layers.batch_invariant",
)

# What vLLM's enable_batch_invariant_mode() and our batch_invariant() change.
ENVIRONMENT = (
    "VLLM_BATCH_INVARIANT",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
)
REDUCTIONS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


def _upstream() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(
        f"vLLM has none of {', '.join(MODULES)}; expected one, with the "
        "batch-invariant operators. Use a release of vLLM that this package supports."
    )


_lock = threading.Lock()
_open_blocks = 0  # in all threads
_turn_off = ExitStack()


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Batch-invariant operators, differentiable, for the time of the block.

    The switch is vLLM's own, `VLLM_BATCH_INVARIANT`, and its operators replace
    PyTorch's. Both belong to the process: while one thread is inside, all threads have
    them. Blocks may nest and overlap, and the end of the last one turns them off. In a
    process whose engine was started with the switch they are on before and after.

    Enter it before the process's first matrix product, because cuBLAS reads its
    settings once. If an engine without the switch ran in this process before, it is too
    late, and a warning says so: start that engine with `VLLM_BATCH_INVARIANT=1`, or in
    processes of its own. An engine that is started inside the block keeps the mode on
    after it.
    """
    global _open_blocks, _turn_off
    with _lock:
        if _open_blocks == 0:
            _turn_off = _turn_on()
        _open_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if _open_blocks == 0:
                _turn_off.close()


def _turn_on() -> ExitStack:
    """Turn the mode on; returns what turns it off."""
    upstream = _upstream()
    engine_was_started = envs._is_envs_cache_enabled()
    with ExitStack() as stack:
        # vLLM 0.26 also replaces the function torch.bmm by one without a gradient. The
        # function of PyTorch calls the operator that vLLM has replaced, and has one.
        builtin_bmm = torch._C._VariableFunctions.bmm
        if upstream._batch_invariant_MODE and envs.VLLM_BATCH_INVARIANT:
            stack.callback(setattr, torch, "bmm", torch.bmm)
            torch.bmm = builtin_bmm
            return stack.pop_all()
        if engine_was_started and not envs.VLLM_BATCH_INVARIANT:
            logger.warning(
                "An engine without VLLM_BATCH_INVARIANT=1 was started in this process. "
                "While batch_invariant() is entered its steps use the batch-invariant "
                "operators too, and cuBLAS may keep the settings that it began with, "
                "so that trainer and engine round differently. Start the engine with "
                "VLLM_BATCH_INVARIANT=1, or in processes of its own."
            )
        stack.callback(setattr, torch, "bmm", builtin_bmm)
        stack.callback(_read_environment_again)
        for name in ENVIRONMENT:
            stack.callback(_set_environment, name, os.environ.get(name))
        matmul = torch.backends.cuda.matmul
        for name in REDUCTIONS:
            stack.callback(setattr, matmul, name, getattr(matmul, name))
        blas = torch.backends.cuda.preferred_blas_library()
        stack.callback(torch.backends.cuda.preferred_blas_library, blas)
        stack.callback(_disable, upstream)
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        upstream.enable_batch_invariant_mode()
        use_cpu_operators()
        torch.bmm = builtin_bmm
        _read_environment_again()
        turn_off = stack.pop_all()
    result = ExitStack()

    def close() -> None:
        if envs._is_envs_cache_enabled() and not engine_was_started:
            logger.info(
                "The batch-invariant operators stay on: an engine was started inside "
                "batch_invariant()."
            )
        else:
            turn_off.close()

    result.callback(close)
    return result


def use_cpu_operators() -> None:
    """Replace vLLM's batch-invariant operators, if they are on, where this is a CPU.

    vLLM's are in Triton, for GPUs.

    Raises:
        RuntimeError: The operators of a CPU were not compiled with this vLLM.

    """
    upstream = _upstream()
    if not (current_platform.is_cpu() and upstream._batch_invariant_MODE):
        return
    from vllm.model_executor.layers.tree_linear import cpu_operators

    _disable(upstream)
    library = torch.library.Library("aten", "IMPL")
    upstream._batch_invariant_LIB = library
    upstream._batch_invariant_MODE = True
    cpu_operators.register_cpu_operators(library)


def _disable(upstream: Any) -> None:
    if upstream._batch_invariant_LIB is not None:
        upstream._batch_invariant_LIB._destroy()
    upstream._batch_invariant_LIB = None
    upstream._batch_invariant_MODE = False


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _read_environment_again() -> None:
    """Empty vLLM's cache of environment variables, which an engine's start filled."""
    if envs._is_envs_cache_enabled():
        envs.disable_envs_cache()
        envs.enable_envs_cache()


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> torch.Tensor:
        from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

        ctx.save_for_backward(logits, token_ids)
        return compute_token_logprobs(logits, token_ids[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, token_ids = ctx.saved_tensors
        # d log p[t] / d logit[v] = (v == t) - softmax[v]
        gradient = torch.softmax(logits, -1, dtype=torch.float32) * -grad[:, None]
        gradient.scatter_add_(1, token_ids[:, None], grad[:, None])
        return gradient.to(logits.dtype), None


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens, by the kernel that vLLM's sampler uses.

    Args:
        logits: `[tokens, vocab]` in the dtype that the model computes them in; the
            kernel sums in float32, in an order that depends on this dtype.
        token_ids: int64 `[tokens]`.

    Returns:
        float32 `[tokens]`, differentiable.
    """
    if not logits.is_cuda:
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        return log_probs.gather(-1, token_ids[:, None])[:, 0]
    return _TokenLogProbs.apply(logits.contiguous(), token_ids)
