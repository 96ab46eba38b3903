# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's flash attention over packed sequences, with a gradient, on NVIDIA GPUs.

The forward is the kernel that vLLM's engine runs, so that training and serving compute
the same bits. `backward.py` has the gradient.
"""

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import vllm.envs as envs
from vllm.utils.torch_utils import direct_register_custom_op, vllm_lib
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn_invariant import changes_bits_at_decode
from vllm.v1.attention.training.backward import Problem, select_backward
from vllm.v1.attention.training.kernel import (
    AttentionParams,
    Gradients,
    empty_gradients,
    sink_gradient,
)
from vllm.v1.attention.training.sequences import Sequences


def _flash_attn_training(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    soft_cap: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    if q.shape[0] == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    fa_version = _fa_version(q.shape[-1])
    assert fa_version is not None  # otherwise `unsupported` names "this GPU"
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q=max_seqlen,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_k=max_seqlen,
        cu_seqlens_k=cu_seqlens,
        softmax_scale=scale,
        causal=causal,
        window_size=[window_left, window_right],
        softcap=soft_cap,
        return_softmax_lse=True,
        # How the keys are split depends on the batch, and would change the bits.
        num_splits=1,
        fa_version=fa_version,
        s_aux=sinks,
    )
    return out, lse


def _flash_attn_training_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _flash_attn_training_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    soft_cap: float,
    deterministic: bool,
) -> Gradients:
    if q.shape[0] == 0:
        return empty_gradients(q, k, v)
    problem = Problem(
        grad_out.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        max_seqlen,
        scale,
        causal,
        (window_left, window_right),
        soft_cap,
        deterministic,
    )
    return select_backward(q.shape[-1], soft_cap, deterministic).run(problem)


def _flash_attn_training_backward_fake(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
) -> Gradients:
    return empty_gradients(q, k, v)


class _FlashAttnTraining(torch.autograd.Function):
    """The gradient of `vllm::flash_attn_training`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.vllm.flash_attn_training.default(
                q, k, v, sinks, cu_seqlens, *options
            )
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_seqlens)
        ctx.options = options
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: torch.Tensor, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse, cu_seqlens = ctx.saved_tensors
        grad_qkv = torch.ops.vllm.flash_attn_training_backward.default(
            grad_out, q, k, v, out, lse, cu_seqlens, *ctx.options
        )
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            grad_sinks = sink_gradient(grad_out, sinks, out, lse.T)
        return *grad_qkv, grad_sinks, *(None,) * (1 + len(ctx.options))


# Not registered by torch.library.custom_op, with which a call costs the host 80
# microseconds more.
direct_register_custom_op(
    "flash_attn_training",
    _flash_attn_training,
    fake_impl=_flash_attn_training_fake,
    dispatch_key="CUDA",
)
direct_register_custom_op(
    "flash_attn_training_backward",
    _flash_attn_training_backward,
    fake_impl=_flash_attn_training_backward_fake,
    dispatch_key="CUDA",
)
vllm_lib.impl("flash_attn_training", _FlashAttnTraining.apply, "Autograd")


@functools.cache
def _cached_fa_version(head_dim: int) -> int | None:
    return get_flash_attn_version(head_size=head_dim)


# Called during tracing, but not traceable itself.
@torch.compiler.assume_constant_result
def _fa_version(head_dim: int) -> int | None:
    return _cached_fa_version(head_dim)


def _not_taken(q: torch.Tensor) -> str | None:
    """The dtype or head size, if no flash attention takes it."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"head_dim {q.shape[-1]}"
    return None


def unsupported(q: torch.Tensor, params: AttentionParams) -> str | None:
    """What `flash_attention` cannot do of this, by name; None if it can do all."""
    head_dim = q.shape[-1]
    if (reason := _not_taken(q)) is not None:
        return reason
    if params.dropout > 0:
        return "dropout"
    if params.sliding_window is not None and head_dim > 192:
        # FA3 of vLLM 0.26.0 on an H200 is off by 5 % with windows from 100 keys on.
        return f"a sliding window at head_dim {head_dim}"
    if _fa_version(head_dim) is None:
        return "this GPU"
    if params.sinks is not None and _fa_version(head_dim) == 2:
        return "attention sinks"
    return None


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """An `AttentionKernel`: the forward of vLLM's engine, and a library's backward."""
    max_seqlen = sequences.max_seqlen
    window = _window(params)
    if (
        envs.VLLM_BATCH_INVARIANT
        and window == (-1, -1)
        and params.causal
        and changes_bits_at_decode(q.shape[-1])
    ):
        # The same window as in FlashAttentionInvariantBackend: it hides no key, and
        # training rounds as the engine's steps do.
        window, max_seqlen = (max_seqlen, 0), max_seqlen + 2
    sinks = params.sinks
    if sinks is not None:
        sinks = sinks.to(torch.bfloat16)  # the only dtype that the kernel takes
    out, _ = torch.ops.vllm.flash_attn_training.default(
        q,
        k,
        v,
        sinks,
        sequences.offsets(q.device),
        max_seqlen,
        params.scale,
        params.causal,
        *window,
        params.logits_soft_cap or 0.0,
        params.deterministic,
    )
    return out


def dropout_unsupported(q: torch.Tensor, params: AttentionParams) -> str | None:
    """What `flash_attention_with_dropout` cannot do; None if it can do all."""
    if (reason := _not_taken(q)) is not None:
        return reason
    if params.logits_soft_cap is not None:
        return "a soft cap"
    if params.sinks is not None:
        return "attention sinks"
    return None


def flash_attention_with_dropout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """An `AttentionKernel`: PyTorch's FlashAttention-2, which has dropout.

    Its random numbers come from a counter (Philox), so a recomputed forward and the
    backward drop the same weights.
    """
    cu_seqlens = sequences.offsets(q.device)
    left, right = (None if side < 0 else side for side in _window(params))
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        sequences.max_seqlen,
        sequences.max_seqlen,
        params.dropout,
        params.causal,
        False,
        scale=params.scale,
        window_size_left=left,
        window_size_right=right,
    )[0]


def _window(params: AttentionParams) -> tuple[int, int]:
    """Keys that a query sees before and after itself, -1 for all."""
    if params.sliding_window is None:
        return -1, -1
    keys = params.sliding_window - 1
    return keys, 0 if params.causal else keys
