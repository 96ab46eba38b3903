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

import torch

import vllm.envs as envs
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn_invariant import changes_bits_at_decode
from vllm.v1.attention.ops.packed_attention import AttentionParams, Sequences

BACKWARD_VARIABLE = "VLLM_TRAINING_ATTENTION_BACKWARD"

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """What a backward engine is asked to differentiate.

    q, out, grad_out: `[tokens, heads, head_dim]`, bfloat16 or float16
    k, v: `[tokens, kv_heads, head_dim]`
    lse: float32 `[heads, tokens]`
    cu_seqlens: int32 `[num_seqs + 1]`
    window: keys seen before and after a query, -1 for all
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
    deterministic: bool


@dataclass(frozen=True)
class BackwardEngine:
    """A library's backward.

    `refuses(problem)` names what of the problem it cannot do, or None.
    """

    available: Callable[[], bool]
    refuses: Callable[[Problem], str | None]
    run: Callable[[Problem], Gradients]


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
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
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=p.cu_seqlens,
        cu_seqlens_k=p.cu_seqlens,
        max_seqlen_q=p.max_seqlen,
        max_seqlen_k=p.max_seqlen,
        deterministic=p.deterministic,
    )[:3]
    return dq, dk, dv


def _aten_refuses(p: Problem) -> str | None:
    return "a deterministic gradient" if p.deterministic else None


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


# The first that is available and does not refuse is used: by speed on an H200.
BACKWARD_ENGINES = {
    "fa4": BackwardEngine(
        lambda: _has_module("flash_attn.cute"), lambda p: None, _fa4_backward
    ),
    "aten": BackwardEngine(lambda: True, _aten_refuses, _aten_backward),
}


@functools.cache
def _available_engines() -> dict[str, BackwardEngine]:
    return {name: e for name, e in BACKWARD_ENGINES.items() if e.available()}


def select_backward(problem: Problem) -> BackwardEngine:
    """The engine for `problem`, or the one that the environment names.

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
    for name, engine in engines.items():
        reason = engine.refuses(problem)
        if reason is None:
            return engine
        reasons.append(f"{name} cannot do {reason}")
    raise NotImplementedError(
        f"No backward for this attention: {'; '.join(reasons)}. Install flash-attn-4, "
        f"or unset {BACKWARD_VARIABLE} if it is set."
    )


@torch.library.custom_op("vllm::flash_attn_training", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
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
        return_softmax_lse=True,
        # Splits of the keys depend on the batch and would change the bits.
        num_splits=1,
        fa_version=fa_version,
    )
    return out, lse


@_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, *_):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("vllm::flash_attn_training_backward", mutates_args=())
def _backward(
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
        deterministic,
    )
    return select_backward(problem).run(problem)


@_backward.register_fake
def _(grad_out, q, k, v, *_):
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _autograd_backward(ctx, grad_out, _):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    gradients = _backward(grad_out, q, k, v, out, lse, cu_seqlens, *ctx.options)
    return *gradients, *(None,) * (1 + len(ctx.options))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@functools.cache
def _fa_version(head_dim: int) -> int | None:
    return get_flash_attn_version(head_size=head_dim)


def unsupported(q: torch.Tensor, params: AttentionParams) -> str | None:
    """What this kernel cannot do of a call, by name; None if it can do all."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}"
    if params.dropout > 0:
        return "dropout"
    if params.logits_soft_cap is not None:
        return "a soft cap"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"head_dim {q.shape[-1]}"
    if params.sliding_window is not None and q.shape[-1] > 192:
        # FA3 of vLLM 0.26.0 on an H200: off by 5 % from a window of 100 on.
        return f"a sliding window at head_dim {q.shape[-1]}"
    if _fa_version(q.shape[-1]) is None:
        return "this GPU"
    return None


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """Attention of `[tokens, heads, head_dim]` tensors, within each sequence."""
    cu_seqlens = sequences.cu_seqlens
    if cu_seqlens is None:
        tokens = sequences.num_seqs * sequences.max_seqlen
        cu_seqlens = torch.arange(
            0,
            tokens + 1,
            max(sequences.max_seqlen, 1),
            dtype=torch.int32,
            device=q.device,
        )
    max_seqlen = sequences.max_seqlen
    window = (-1, -1)
    if params.sliding_window is not None:
        keys = params.sliding_window - 1
        window = (keys, 0) if params.causal else (keys, keys)
    elif (
        envs.VLLM_BATCH_INVARIANT
        and params.causal
        and changes_bits_at_decode(q.shape[-1])
    ):
        # As in FlashAttentionInvariantBackend: hides nothing, keeps the bits.
        window, max_seqlen = (max_seqlen, 0), max_seqlen + 2
    out, _ = torch.ops.vllm.flash_attn_training(
        q,
        k,
        v,
        cu_seqlens.to(q.device, torch.int32),
        max_seqlen,
        params.scale,
        params.causal,
        *window,
        params.deterministic,
    )
    return out
