# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Variable-length flash attention with a gradient, on NVIDIA GPUs.

The forward is the kernel that vLLM's engine runs, so that training and serving
compute the same bits. vLLM ships no backward; the fastest of those installed that
takes the forward's output and log-sum-exp is used.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import vllm.envs as envs
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import direct_register_custom_op, vllm_lib
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn_invariant import changes_bits_at_decode
from vllm.v1.attention.ops.packed_attention import (
    AttentionParams,
    Sequences,
    sink_gradient,
)

BACKWARD_VARIABLE = "VLLM_TRAINING_ATTENTION_BACKWARD"

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """What a backward engine is asked to differentiate.

    q, out, grad_out: `[tokens, heads, head_dim]`, bfloat16 or float16
    k, v: `[tokens, kv_heads, head_dim]`
    lse: float32 `[heads, tokens]`, attention sinks included
    cu_seqlens: int32 `[num_seqs + 1]`
    window: keys seen before and after a query, -1 for all
    soft_cap: scores became `soft_cap * tanh(score / soft_cap)`, 0 for none
    """

    grad_out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    scale: float
    causal: bool
    window: tuple[int, int]
    soft_cap: float
    deterministic: bool


@dataclass(frozen=True)
class BackwardEngine:
    """A library's backward.

    `refuses(head_dim, soft_cap, deterministic)` names what it cannot do, or None.
    """

    available: Callable[[], bool]
    refuses: Callable[[int, float, bool], str | None]
    run: Callable[[Problem], Gradients]


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _fa4_available() -> bool:
    # Not by its module: flash-attn 2 brings an old one, without packed sequences.
    try:
        return bool(metadata.version("flash-attn-4"))
    except metadata.PackageNotFoundError:
        return False


def _fa4_backward(p: Problem) -> Gradients:
    from flash_attn.cute.interface import _flash_attn_bwd

    left, right = (None if side < 0 else side for side in p.window)
    dq, dk, dv = _flash_attn_bwd(
        p.q,
        p.k,
        p.v,
        p.out,
        p.grad_out,
        p.lse,
        softmax_scale=p.scale,
        causal=p.causal,
        softcap=p.soft_cap,
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=p.cu_seqlens,
        cu_seqlens_k=p.cu_seqlens,
        max_seqlen_q=p.max_seqlen,
        max_seqlen_k=p.max_seqlen,
        deterministic=p.deterministic,
    )[:3]
    return dq, dk, dv


def _fa3_available() -> bool:
    return current_platform.is_device_capability(90) and _has_module("flash_attn_3._C")


def _fa3_refuses(head_dim: int, soft_cap: float, deterministic: bool) -> str | None:
    if soft_cap:  # some builds leave it out and cannot be asked
        return "a soft cap"
    if deterministic and head_dim > 192:
        return f"a deterministic gradient at head_dim {head_dim}"
    return None


def _fa3_backward(p: Problem) -> Gradients:
    import flash_attn_3._C  # noqa: F401 registers the op

    grads = _empty_gradients(p.q, p.k, p.v)
    torch.ops.flash_attn_3.bwd(
        p.grad_out,
        p.q,
        p.k,
        p.v,
        p.out,
        p.lse,
        *grads,
        cu_seqlens_q=p.cu_seqlens,
        cu_seqlens_k=p.cu_seqlens,
        max_seqlen_q=p.max_seqlen,
        max_seqlen_k=p.max_seqlen,
        softmax_scale=p.scale,
        is_causal=p.causal,
        window_size_left=p.window[0],
        window_size_right=p.window[1],
        softcap=p.soft_cap,
        deterministic=p.deterministic,
    )
    return grads


def _fa2_backward(p: Problem) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = _empty_gradients(p.q, p.k, p.v)
    _flash_attn_varlen_backward(
        p.grad_out,
        p.q,
        p.k,
        p.v,
        p.out,
        p.lse,
        *grads,
        p.cu_seqlens,
        p.cu_seqlens,
        p.max_seqlen,
        p.max_seqlen,
        0.0,
        p.scale,
        p.causal,
        *p.window,
        p.soft_cap,
        None,
        p.deterministic,
    )
    return grads


def _empty_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))
    return dq, dk, dv


def _aten_refuses(head_dim: int, soft_cap: float, deterministic: bool) -> str | None:
    if soft_cap:
        return "a soft cap"
    return "a deterministic gradient" if deterministic else None


def _aten_backward(p: Problem) -> Gradients:
    no_dropout = torch.empty(2, dtype=torch.uint64, device=p.q.device)
    return torch.ops.aten._flash_attention_backward(
        p.grad_out,
        p.q,
        p.k,
        p.v,
        p.out,
        p.lse,
        p.cu_seqlens,
        p.cu_seqlens,
        p.max_seqlen,
        p.max_seqlen,
        0.0,
        p.causal,
        no_dropout,
        no_dropout,
        scale=p.scale,
        window_size_left=None if p.window[0] < 0 else p.window[0],
        window_size_right=None if p.window[1] < 0 else p.window[1],
    )


def _triton_backward(p: Problem) -> Gradients:
    from vllm.v1.attention.training.triton_backward import attention_backward

    return attention_backward(
        p.grad_out,
        p.q,
        p.k,
        p.v,
        p.out,
        p.lse,
        p.cu_seqlens,
        p.max_seqlen,
        p.scale,
        p.causal,
        p.window,
        p.soft_cap,
    )


BACKWARD_ENGINES = {
    "fa4": BackwardEngine(_fa4_available, lambda *_: None, _fa4_backward),
    "fa3": BackwardEngine(_fa3_available, _fa3_refuses, _fa3_backward),
    "fa2": BackwardEngine(
        lambda: _has_module("flash_attn_2_cuda"), lambda *_: None, _fa2_backward
    ),
    "aten": BackwardEngine(lambda: True, _aten_refuses, _aten_backward),
    "triton": BackwardEngine(lambda: HAS_TRITON, lambda *_: None, _triton_backward),
}


def _by_speed(head_dim: int) -> tuple[str, ...]:
    """Names of the engines, the fastest first, as measured on an H200."""
    if head_dim > 128:
        return "fa3", "fa4", "fa2", "aten", "triton"
    return "fa4", "fa3", "fa2", "aten", "triton"


@functools.cache
def _available_engines() -> dict[str, BackwardEngine]:
    return {name: e for name, e in BACKWARD_ENGINES.items() if e.available()}


def select_backward(
    head_dim: int, soft_cap: float, deterministic: bool
) -> BackwardEngine:
    """The fastest engine that can do it, or the one that the environment names.

    Raises:
        ValueError: the environment names an engine that is not there.
        NotImplementedError: none there can do it, each with its reason.

    """
    engines = _available_engines()
    if name := os.environ.get(BACKWARD_VARIABLE):
        if name not in engines:
            raise ValueError(
                f"{BACKWARD_VARIABLE}={name!r} is not available here; choose one of "
                f"{', '.join(engines)}."
            )
        engines = {name: engines[name]}
    reasons = []
    for name in _by_speed(head_dim):
        if name not in engines:
            continue
        reason = engines[name].refuses(head_dim, soft_cap, deterministic)
        if reason is None:
            return engines[name]
        reasons.append(f"{name} cannot do {reason}")
    raise NotImplementedError(
        f"No backward for this attention: {'; '.join(reasons)}. Unset "
        f"{BACKWARD_VARIABLE} if it is set, or install Triton or flash-attn-4."
    )


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
    assert fa_version is not None  # `unsupported` has said so
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
        # Splits of the keys depend on the batch and would change the bits.
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.shape[0] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(q, k, v)


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


# Not torch.library.custom_op, whose calls cost the host 80 microseconds more.
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


# Asked while torch.compile traces; what they call cannot be traced.
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
    """What this kernel cannot do of a call, by name; None if it can do all."""
    head_dim = q.shape[-1]
    if (reason := _not_taken(q)) is not None:
        return reason
    if params.dropout > 0:
        return "dropout"
    if params.sliding_window is not None and head_dim > 192:
        # FA3 of vLLM 0.26.0 on an H200: off by 5 % from a window of 100 on.
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
    """Attention of `[tokens, heads, head_dim]` tensors, within each sequence."""
    max_seqlen = sequences.max_seqlen
    window = _window(params)
    if (
        envs.VLLM_BATCH_INVARIANT
        and window == (-1, -1)
        and params.causal
        and changes_bits_at_decode(q.shape[-1])
    ):
        # As in FlashAttentionInvariantBackend: hides nothing, keeps the bits.
        window, max_seqlen = (max_seqlen, 0), max_seqlen + 2
    sinks = params.sinks
    if sinks is not None:
        sinks = sinks.to(torch.bfloat16)  # all that the kernel takes
    out, _ = torch.ops.vllm.flash_attn_training.default(
        q,
        k,
        v,
        sinks,
        _cu_seqlens(sequences, q.device),
        max_seqlen,
        params.scale,
        params.causal,
        *window,
        params.logits_soft_cap or 0.0,
        params.deterministic,
    )
    return out


def dropout_unsupported(q: torch.Tensor, params: AttentionParams) -> str | None:
    """What `flash_attention_with_dropout` cannot do, by name; None if it can do all."""
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
    """Like `flash_attention`, by PyTorch's FlashAttention-2.

    It counts its random numbers (Philox), so a recomputed forward and the backward
    drop the same weights.
    """
    cu_seqlens = _cu_seqlens(sequences, q.device)
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
    if params.sliding_window is None:
        return -1, -1
    keys = params.sliding_window - 1
    return keys, 0 if params.causal else keys


def _cu_seqlens(sequences: Sequences, device: torch.device) -> torch.Tensor:
    if sequences.cu_seqlens is not None:
        return sequences.cu_seqlens.to(device, torch.int32)
    end = sequences.num_seqs * sequences.max_seqlen + 1
    step = max(sequences.max_seqlen, 1)
    return torch.arange(0, end, step, dtype=torch.int32, device=device)
