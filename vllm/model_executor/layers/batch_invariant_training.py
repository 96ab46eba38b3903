# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's batch-invariant arithmetic, in a training process and with gradients.

An engine started with `VLLM_BATCH_INVARIANT=1` and a trainer inside
`batch_invariant()` compute the same bits for the same tokens, however these are
batched (tried on an H200).
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["batch_invariant", "token_log_probs"]

# vLLM moved the module after 0.26.
MODULES = (
    "vllm.model_executor.determinism.batch_invariant",
    "vllm.model_executor.layers.batch_invariant",
)


def _upstream() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"vLLM has none of {', '.join(MODULES)}.")


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Batch-invariant operators, differentiable, for the time of the block.

    The switch is vLLM's own, `VLLM_BATCH_INVARIANT`; inside an engine's process that
    was started with it, the block changes only what hinders gradients. Enter it
    before the process's first matrix product: cuBLAS reads its settings once.
    """
    upstream = _upstream()
    before = {
        name: os.environ.get(name)
        for name in (
            "VLLM_BATCH_INVARIANT",
            "CUBLAS_WORKSPACE_CONFIG",
            "CUBLASLT_WORKSPACE_SIZE",
        )
    }
    already_on = upstream._batch_invariant_MODE
    matmul = torch.backends.cuda.matmul
    reduced = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    library = torch.backends.cuda.preferred_blas_library()
    replaced_bmm = torch.bmm
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    upstream.enable_batch_invariant_mode()
    # Some versions replace the function as well, which would cut the gradient off.
    torch.bmm = torch._C._VariableFunctions.bmm
    try:
        yield
    finally:
        torch.bmm = replaced_bmm
        if not already_on:
            upstream._batch_invariant_LIB._destroy()
            upstream._batch_invariant_LIB = None
            upstream._batch_invariant_MODE = False
            (
                matmul.allow_fp16_reduced_precision_reduction,
                matmul.allow_bf16_reduced_precision_reduction,
            ) = reduced
            torch.backends.cuda.preferred_blas_library(library)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


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
    """Log-probabilities of tokens, by the kernel that vLLM's GPU sampler uses.

    Args:
        logits: `[tokens, vocab]` in the dtype that the model computes them in; the
            kernel sums in float32, in an order that depends on this dtype.
        token_ids: int64 `[tokens]`.

    Returns:
        float32 `[tokens]`, differentiable.

    """
    return _TokenLogProbs.apply(logits.contiguous(), token_ids)
