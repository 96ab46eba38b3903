# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Packed attention with a gradient on a CPU, by `csrc/cpu/packed_attention.cpp`.

The operator is compiled where a compiler and cmake were found when this vLLM was built.
Without it `select_kernel` takes PyTorch's kernels, and one warning says so.
"""

from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import vllm
import vllm.envs as envs
from vllm.logger import init_logger
from vllm.utils.torch_utils import vllm_lib
from vllm.v1.attention.training.kernel import (
    AttentionParams,
    Gradients,
    empty_gradients,
)
from vllm.v1.attention.training.sequences import Sequences

logger = init_logger(__name__)

_LIBRARY = Path(vllm.__file__).with_name("_packed_attention_C.so")


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)  # [tokens, heads]
    return q.new_empty(q.shape), lse


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> Gradients:
    return empty_gradients(q, k, v)


class _PackedAttention(torch.autograd.Function):
    """The gradient of `vllm::packed_attention_cpu`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.vllm.packed_attention_cpu.default(
                q, k, v, cu_seqlens, *options
            )
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = options
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: torch.Tensor, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        grads = torch.ops.vllm.packed_attention_cpu_backward.default(
            grad_out, *ctx.saved_tensors, *ctx.options
        )
        return *grads, None, *(None,) * len(ctx.options)


def _load() -> tuple[torch.dtype, ...]:
    """Loads and registers the operators; returns the dtypes that they take here."""
    if not _LIBRARY.exists():
        reason = "it was not compiled when this vLLM was built"
    else:
        try:
            torch.ops.load_library(_LIBRARY)
        except OSError as error:  # compiled for another torch
            reason = str(error)
        else:
            name = "packed_attention_cpu"
            torch.library.register_fake(f"vllm::{name}", _fake, lib=vllm_lib)
            torch.library.register_fake(
                f"vllm::{name}_backward", _fake_backward, lib=vllm_lib
            )
            vllm_lib.impl(name, _PackedAttention.apply, "Autograd")
            if torch.ops.vllm.packed_attention_cpu_has_bfloat16():
                return torch.float32, torch.bfloat16
            return (torch.float32,)
    logger.warning(
        "TrainableAttention trains with PyTorch's kernels on this CPU; its own, which "
        "is faster, is not there: %s. To compile it, install a C++ compiler and cmake "
        "and build this vLLM again.",
        reason,
    )
    return ()


_DTYPES = _load()


def _widens(dtype: torch.dtype) -> bool:
    """Whether `dtype` is computed in float32, as batch-invariant mode does.

    Then a row's bits depend on nothing else in the batch, with AMX and without.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    return narrow and envs.VLLM_BATCH_INVARIANT and torch.float32 in _DTYPES


def unsupported(
    q: torch.Tensor, k: torch.Tensor, params: AttentionParams
) -> str | None:
    """What `cpu_attention` cannot do of this, by name; None if it can do all."""
    if q.dtype not in _DTYPES and not _widens(q.dtype):
        return f"dtype {q.dtype}"
    if q.shape[-1] % 32 or q.shape[-1] == 0:
        return f"head_dim {q.shape[-1]}, which is not a multiple of 32"
    if q.shape[-2] > 128 * k.shape[-2]:
        return "more than 128 query heads for a key head"
    if params.dropout > 0:
        return "dropout"
    if params.logits_soft_cap is not None:
        return "a soft cap"
    return None if params.sinks is None else "attention sinks"


def cpu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """An `AttentionKernel`; its gradient has the same bits on every run."""
    if _widens(q.dtype):
        out = cpu_attention(q.float(), k.float(), v.float(), sequences, params)
        return out.to(q.dtype)
    return torch.ops.vllm.packed_attention_cpu(
        q,
        k,
        v,
        sequences.offsets(q.device),
        params.scale,
        params.causal,
        -1 if params.sliding_window is None else params.sliding_window,
    )[0]
