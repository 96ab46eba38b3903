# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The gradient of vLLM's flash attention, by the fastest library that is installed.

vLLM ships no backward. The libraries here take the output and the log-sum-exp of vLLM's
forward. `select_backward` chooses one.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.training.kernel import Gradients, empty_gradients

BACKWARD_VARIABLE = "VLLM_TRAINING_ATTENTION_BACKWARD"


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

    available: Whether it can run on this machine.
    refuses: Of `(head_dim, soft_cap, deterministic)`, what it cannot do, by name; None
        if it can do all.
    run: The gradients of q, k and v.
    """

    available: Callable[[], bool]
    refuses: Callable[[int, float, bool], str | None]
    run: Callable[[Problem], Gradients]


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is not there
        return False


def _fa4_available() -> bool:
    # Check the distribution: flash-attn 2 ships an old flash_attn.cute without varlen.
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
    if soft_cap:  # Some builds leave it out, and there is no way to ask a build.
        return "a soft cap"
    if deterministic and head_dim > 192:
        return f"a deterministic gradient at head_dim {head_dim}"
    return None


def _fa3_backward(p: Problem) -> Gradients:
    import flash_attn_3._C  # noqa: F401 registers the operator

    grads = empty_gradients(p.q, p.k, p.v)
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

    grads = empty_gradients(p.q, p.k, p.v)
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
    # Imported here, because Triton compiles only where there is a GPU.
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
    """The fastest engine that can do it, or the one that `BACKWARD_VARIABLE` names.

    Args:
        head_dim: Size of each head.
        soft_cap: Bound of the scores, 0 for none.
        deterministic: The gradient must have the same bits on every run.

    Raises:
        ValueError: The environment names an engine that is not there.
        NotImplementedError: No engine that is there can do it. Each reason is given.
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
