# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Differentiable attention over packed sequences, outside an engine step.

`select_kernel` is the one place where a kernel is chosen.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from vllm.logger import init_logger

logger = init_logger(__name__)


# int32 `[num_seqs + 1]`; a tensor, or what torch.as_tensor makes one of.
CuSeqlens = torch.Tensor | Sequence[int] | np.ndarray


def as_cu_seqlens(cu_seqlens: CuSeqlens) -> torch.Tensor:
    """`cu_seqlens` as an integer tensor of one axis.

    Raises:
        TypeError: it is no tensor and cannot be made one.
        ValueError: it has another shape or dtype.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        try:
            cu_seqlens = torch.as_tensor(cu_seqlens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "cu_seqlens must be an int32 tensor of shape [num_seqs + 1], or a list "
                f"of as many integers, got {cu_seqlens!r:.80}: {error}"
            ) from error
    if (
        cu_seqlens.dim() != 1
        or cu_seqlens.numel() == 0
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            "cu_seqlens must be an int32 tensor of shape [num_seqs + 1], got "
            f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}. Build it as "
            "F.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))."
        )
    return cu_seqlens


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences along one token axis.

    Either ragged, bounded by `cu_seqlens`, or `num_seqs` rows of `max_seqlen`
    tokens each (then `cu_seqlens` is None and no length ever leaves the device).
    """

    num_seqs: int
    max_seqlen: int
    cu_seqlens: torch.Tensor | None = None  # [num_seqs + 1]
    ragged_lengths: tuple[int, ...] = ()

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: CuSeqlens) -> "Sequences":
        """Checks `cu_seqlens` and reads it: on a GPU this waits for the device.

        Raises:
            TypeError: it is no tensor and cannot be made one.
            ValueError: it has another shape or dtype, or decreases.
        """
        cu_seqlens = as_cu_seqlens(cu_seqlens)
        offsets = cu_seqlens.tolist()
        lengths = tuple(end - start for start, end in pairwise(offsets))
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            shown = offsets if len(offsets) <= 16 else [*offsets[:15], "..."]
            raise ValueError(
                f"cu_seqlens must start at 0 and never decrease, got {shown}. It holds "
                "cumulative lengths, not lengths: sequence i is tokens "
                "cu_seqlens[i]:cu_seqlens[i + 1]."
            )
        return cls(len(lengths), max(lengths, default=0), cu_seqlens, lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.cu_seqlens is None:
            return (self.max_seqlen,) * self.num_seqs
        return self.ragged_lengths


# PyTorch carries these thread-locals to the threads that run backward, which it does
# not do for a ContextVar: activation checkpointing recomputes the forward there.
_SEQUENCES_KEY = "vllm.packed_sequences"
_PACKED_NODES_KEY = "vllm.packed_sequences.nodes"
_lock = threading.Lock()
# In all threads; torch.compile guards on it. It cannot guard on the thread-locals
# above: while any thread has packed sequences, a compiled layer asks at run time.
_num_active = 0


class _PackedNodes:
    """Which autograd nodes a thread made inside `packed_sequences`.

    They are ranges of PyTorch's sequence numbers, which count a thread's nodes.
    """

    MOST_RANGES = 1024

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, int]] = deque()

    def add(self, start: int, end: int) -> None:
        if self._ranges and self._ranges[-1][1] >= start:
            start = min(start, self._ranges.pop()[0])
        self._ranges.append((start, end))
        if len(self._ranges) > self.MOST_RANGES:
            # The graphs of the oldest are gone, most likely. To take what lies between
            # two of them for packed could only cause an error, and no wrong gradient.
            (first, _), (_, last) = self._ranges.popleft(), self._ranges.popleft()
            self._ranges.appendleft((first, last))

    def contain(self, node: torch.autograd.graph.Node) -> bool:
        number = node._sequence_nr()
        return any(start <= number < end for start, end in self._ranges)


def _thread_local(key: str) -> Any:
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def current_sequences() -> Sequences | None:
    return _thread_local(_SEQUENCES_KEY)


@contextmanager
def packed_sequences(cu_seqlens: CuSeqlens) -> Iterator[None]:
    """Tells every trainable attention layer called inside where sequences begin.

    For training on packed batches without threading `cu_seqlens` through each
    layer's forward:

        with packed_sequences(cu_seqlens):
            loss = loss_fn(model(input_ids, positions), labels)
            loss.backward()

    `cu_seqlens` is read once, here, for all layers. It applies to this thread and
    to its backward. With activation checkpointing, call `backward()` inside too,
    because the forward is recomputed then. An argument given to a layer wins over
    this. In an engine step it has no effect.

    Args:
        cu_seqlens: int32 `[num_seqs + 1]`, cumulative lengths that start at 0;
            sequence i is tokens `cu_seqlens[i]:cu_seqlens[i + 1]`. A list will do.

    Raises:
        TypeError: `cu_seqlens` is no tensor and cannot be made one.
        ValueError: `cu_seqlens` has another shape or dtype, or decreases.
    """
    global _num_active
    sequences = Sequences.from_cu_seqlens(cu_seqlens)
    outer = current_sequences()
    nodes = _thread_local(_PACKED_NODES_KEY)
    if nodes is None:
        nodes = _PackedNodes()
        torch._C._stash_obj_in_tls(_PACKED_NODES_KEY, nodes)
    first_node = torch.autograd._get_sequence_nr()
    with _lock:
        _num_active += 1
    torch._C._stash_obj_in_tls(_SEQUENCES_KEY, sequences)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_SEQUENCES_KEY, outer)
        nodes.add(first_node, torch.autograd._get_sequence_nr())
        with _lock:
            _num_active -= 1


def _recomputes_a_pack() -> bool:
    """Whether this is activation checkpointing's second run of a packed forward.

    It runs for a node of the first run, which was made inside `packed_sequences`.
    """
    if torch._C._current_graph_task_id() == -1:
        return False  # not in backward
    nodes, node = _thread_local(_PACKED_NODES_KEY), torch._C._current_autograd_node()
    return nodes is not None and node is not None and nodes.contain(node)


def sequences_of(rows: Sequences, cu_seqlens: CuSeqlens | None) -> Sequences:
    """The sequences of a batch: by `cu_seqlens`, by `packed_sequences`, or its rows.

    Raises:
        TypeError: `cu_seqlens` is no tensor and cannot be made one.
        ValueError: the lengths do not fit the batch.
        RuntimeError: a recomputation in backward runs outside its `packed_sequences`.
    """
    sequences = (
        current_sequences()
        if cu_seqlens is None
        else Sequences.from_cu_seqlens(cu_seqlens)
    )
    if sequences is None:
        if rows.num_seqs == 1 and _recomputes_a_pack():
            # To take a pack for one sequence would give wrong gradients silently.
            raise RuntimeError(
                "Attention is recomputed in backward (activation checkpointing) "
                "outside packed_sequences(). Call backward() inside the `with` "
                "block, or pass cu_seqlens through the checkpointed function."
            )
        return rows
    if rows.num_seqs != 1:
        raise ValueError(
            f"cu_seqlens is for packed tokens, but the batch has {rows.num_seqs} "
            f"rows of {rows.max_seqlen}. Flatten it to [tokens, ...], or leave "
            "cu_seqlens (and packed_sequences) out."
        )
    if sum(sequences.lengths) != rows.max_seqlen:
        raise ValueError(
            f"cu_seqlens ends at {sum(sequences.lengths)}, but the packed batch "
            f"has {rows.max_seqlen} tokens. Its last entry must be their number."
        )
    return sequences


def graph_is_dense(cu_seqlens: CuSeqlens | None) -> bool:
    """While compiling: whether rows are the sequences, so that nothing is ragged."""
    return torch.compiler.is_compiling() and cu_seqlens is None and _num_active == 0


@torch.compiler.disable(reason="reads packed_sequences()")
def current_cu_seqlens() -> torch.Tensor | None:
    sequences = current_sequences()
    return None if sequences is None else sequences.cu_seqlens


class AttentionParams(NamedTuple):
    scale: float
    causal: bool
    sliding_window: int | None
    logits_soft_cap: float | None
    dropout: float
    deterministic: bool
    sinks: torch.Tensor | None = None  # [heads]


# (q, k, v, sequences, params) -> output, where q and the output are
# [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]
AttentionKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequences, AttentionParams],
    torch.Tensor,
]


def select_kernel(
    q: torch.Tensor, k: torch.Tensor, sequences: Sequences, params: AttentionParams
) -> AttentionKernel:
    """Every choice of a training kernel is made here and nowhere else."""
    if q.is_cuda:
        from vllm.v1.attention.ops import flash_attn_training as flash

        if params.dropout > 0:
            reason = flash.dropout_unsupported(q, params)
            kernel = flash.flash_attention_with_dropout
        else:
            reason = flash.unsupported(q, params)
            kernel = flash.flash_attention
        if reason is None:
            return kernel
        if not torch.compiler.is_compiling():
            logger.warning_once(
                "TrainableAttention: flash attention cannot do %s here; PyTorch's "
                "kernels are used, which are slower.",
                reason,
            )
    if q.device.type == "cpu":
        from vllm.v1.attention.ops import packed_attention_cpu as cpu

        if cpu.unsupported(q, k, params) is None:
            return cpu.packed_attention
    window = params.sliding_window
    if (
        params.dropout > 0
        or params.logits_soft_cap is not None
        or params.sinks is not None
    ):
        return _blockwise_attention
    if window is not None and window < sequences.max_seqlen:
        return _blockwise_attention
    return _sdpa_attention


def _sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    """PyTorch's fused attention, one call per sequence or one for equal rows."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:  # each [batch, seq, heads, head_dim]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=params.causal,
            scale=params.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    if sequences.cu_seqlens is None:
        rows = (sequences.num_seqs, sequences.max_seqlen)
        return attend(*(x.unflatten(0, rows) for x in (q, k, v))).flatten(0, 1)
    # split, unlike slices, has a backward that writes each gradient once
    lengths = sequences.lengths or (0,)
    pieces = (x.unsqueeze(0).split(lengths, dim=1) for x in (q, k, v))
    return torch.cat(list(map(attend, *pieces)), dim=1).squeeze(0)


# Queries in a block: few, so that a causal block skips later keys, and fewer where
# the scores of all heads held at once would pass 16 MiB in float32.
_BLOCK_ROWS = 256
_MAX_BLOCK_SCORES = 1 << 22


class _BlockwiseAttention(torch.autograd.Function):
    """Attention in blocks of queries, with the log-sum-exp kept for the backward.

    Takes what PyTorch's fused kernels do not: sliding window, soft cap, dropout,
    attention sinks.
    Memory is linear in tokens, K and V are not expanded for grouped queries, and
    half precision is computed in float32. The backward recomputes the
    probabilities, as in FlashAttention (https://arxiv.org/abs/2205.14135), and
    draws the same dropout again from `seed`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [tokens, heads, head_dim]
        k: torch.Tensor,  # [tokens, kv_heads, head_dim]
        v: torch.Tensor,  # [tokens, kv_heads, head_dim]
        sinks: torch.Tensor | None,  # [heads]
        lengths: tuple[int, ...],
        params: AttentionParams,
        seed: int,
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[0], q.shape[1], dtype=_accumulation_dtype(q))
        blocks = _Blocks(q, k, v, lengths, params, seed)
        with torch.autocast(q.device.type, enabled=False):
            for rows, cols, mask, kept in blocks:
                scores, _ = blocks.scores(rows, cols, mask)
                block_lse = scores.logsumexp(-1, keepdim=True)
                if sinks is not None:
                    sink = sinks.to(lse.dtype).view(*scores.shape[:2], 1, 1)
                    block_lse = torch.logaddexp(block_lse, sink)
                probs = (scores - block_lse).exp_()
                if kept is not None:
                    probs *= kept
                out[rows] = blocks.ungroup(probs.flatten(1, 2) @ blocks.keys(v, cols))
                lse[rows] = blocks.ungroup(block_lse.flatten(1, 2)).squeeze(-1)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.lengths, ctx.params, ctx.seed = lengths, params._replace(sinks=None), seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        params = ctx.params
        # rows are written once; keys are summed over blocks
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = (
            torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v)
        )
        blocks = _Blocks(q, k, v, ctx.lengths, params, ctx.seed)
        with torch.autocast(q.device.type, enabled=False):
            for rows, cols, mask, kept in blocks:
                scores, cap_slope = blocks.scores(rows, cols, mask)
                block_lse = blocks.group(lse[rows].unsqueeze(-1))
                probs = (scores - block_lse.unflatten(1, scores.shape[1:3])).exp_()
                grad_block = blocks.group(grad_out[rows])
                # sum over keys of P * dP, without the scores
                delta = (grad_block * blocks.group(out[rows])).sum(-1, keepdim=True)
                grad_probs = grad_block @ blocks.keys(v, cols).mT
                dropped = probs
                if kept is not None:
                    dropped = probs * kept
                    grad_probs = grad_probs * kept.flatten(1, 2)
                grad_v[cols] += (dropped.flatten(1, 2).mT @ grad_block).transpose(0, 1)
                grad_scores = probs.flatten(1, 2) * (grad_probs - delta)
                if cap_slope is not None:
                    grad_scores *= cap_slope.flatten(1, 2)
                grad_scores *= params.scale
                grad_q[rows] = blocks.ungroup(grad_scores @ blocks.keys(k, cols))
                grad_k[cols] += (grad_scores.mT @ blocks.group(q[rows])).transpose(0, 1)
        grad_sinks = None if sinks is None else sink_gradient(grad_out, sinks, out, lse)
        grad_kv = grad_k.to(k.dtype), grad_v.to(v.dtype)
        return grad_q, *grad_kv, grad_sinks, None, None, None


def sink_gradient(
    grad_out: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """d loss / d sinks `[heads]` of `[tokens, heads, head_dim]` outputs.

    A sink is a key without a value, so its gradient is that of any key's score with
    P·dP = 0: `-p_sink * (out . grad_out)`. `lse`, `[tokens, heads]`, includes it.
    """
    delta = (out.to(lse.dtype) * grad_out).sum(-1)  # [tokens, heads]
    share = torch.exp(sinks.to(lse.dtype) - lse)
    return -(share * delta).sum(0).to(sinks.dtype)


class _Blocks:
    """Walks over blocks of queries and the keys they see; the same way each time.

    A block's tensors are grouped by KV head: [kv_heads, group * rows, ...], so that
    one product serves all query heads that share a KV head.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        params: AttentionParams,
        seed: int,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.lengths, self.params, self.seed = lengths, params, seed
        self.kv_heads, self.group_size = k.shape[1], q.shape[1] // k.shape[1]
        self.dtype = _accumulation_dtype(q)

    def __iter__(
        self,
    ) -> Iterator[tuple[slice, slice, torch.Tensor | None, torch.Tensor | None]]:
        """Yields query rows, key columns, which keys are hidden, dropout factors."""
        heads, device = self.q.shape[1], self.q.device
        causal, window = self.params.causal, self.params.sliding_window
        dropout = self.params.dropout
        generator = None
        if dropout > 0:
            generator = torch.Generator(device).manual_seed(self.seed)
        first = 0
        for length in self.lengths:
            reach = max(length, 1)
            if window is not None:
                reach = min(reach, 2 * window + _BLOCK_ROWS)
            step = min(_BLOCK_ROWS, max(16, _MAX_BLOCK_SCORES // (heads * reach)))
            for start in range(0, length, step):
                end = min(start + step, length)
                lo = 0 if window is None else max(0, start - window + 1)
                hi = end if causal else length
                if window is not None:
                    hi = min(hi, end + window - 1)
                mask = None
                if causal or window is not None:
                    row = torch.arange(start, end, device=device).unsqueeze(1)
                    distance = row - torch.arange(lo, hi, device=device)
                    latest = 0 if causal or window is None else 1 - window
                    mask = distance < latest  # [rows, cols]
                    if window is not None:
                        mask |= distance >= window
                kept = None
                if generator is not None:
                    shape = (self.kv_heads, self.group_size, end - start, hi - lo)
                    draws = torch.rand(
                        shape, generator=generator, device=device, dtype=torch.float32
                    )
                    kept = (draws >= dropout).to(self.dtype).div_(1 - dropout)
                rows = slice(first + start, first + end)
                yield rows, slice(first + lo, first + hi), mask, kept
            first += length

    def group(self, x: torch.Tensor) -> torch.Tensor:
        # [rows, heads, d] -> [kv_heads, group * rows, d]
        x = x.to(self.dtype).unflatten(1, (self.kv_heads, self.group_size))
        return x.permute(1, 2, 0, 3).flatten(1, 2)

    def ungroup(self, x: torch.Tensor) -> torch.Tensor:
        # [kv_heads, group * rows, d] -> [rows, heads, d]
        return x.unflatten(1, (self.group_size, -1)).permute(2, 0, 1, 3).flatten(1, 2)

    def keys(self, x: torch.Tensor, cols: slice) -> torch.Tensor:
        # [tokens, kv_heads, d] -> [kv_heads, cols, d]
        return x[cols].to(self.dtype).transpose(0, 1)

    def scores(
        self, rows: slice, cols: slice, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled, capped and masked scores, and the soft cap's derivative."""
        scores = self.group(self.q[rows]) @ self.keys(self.k, cols).mT
        scores = scores.mul_(self.params.scale).unflatten(1, (self.group_size, -1))
        slope = None
        if (cap := self.params.logits_soft_cap) is not None:
            tanh = (scores / cap).tanh_()
            scores, slope = cap * tanh, 1 - tanh * tanh
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return scores, slope  # [kv_heads, group, rows, cols]


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blockwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    params: AttentionParams,
) -> torch.Tensor:
    if params.dropout > 0:
        return _blockwise_with_dropout(q, k, v, sequences.lengths, params)
    return _BlockwiseAttention.apply(
        q, k, v, params.sinks, sequences.lengths, params, 0
    )


@torch.compiler.disable(reason="random generators cannot be traced")
def _blockwise_with_dropout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    params: AttentionParams,
) -> torch.Tensor:
    # From the CPU's generator: torch.manual_seed and checkpointing govern it, and
    # no device is waited for.
    seed = int(torch.randint(2**63 - 1, ()))
    return _BlockwiseAttention.apply(q, k, v, params.sinks, lengths, params, seed)
