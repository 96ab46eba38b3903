# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which sequences a batch of training attention holds.

They are bounded by `cu_seqlens`, which a caller passes to a layer or, for all layers at
once, to `packed_sequences`. Without it the rows of a batch are its sequences.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

# int32 `[num_seqs + 1]`: a tensor, or what `torch.as_tensor` makes a tensor of.
CuSeqlens = torch.Tensor | Sequence[int] | np.ndarray


def as_cu_seqlens(cu_seqlens: CuSeqlens) -> torch.Tensor:
    """`cu_seqlens` as an int32 or int64 tensor `[num_seqs + 1]`.

    Raises:
        TypeError: It is no tensor and cannot be made one.
        ValueError: It has another shape or dtype.
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

    They are either ragged, and bounded by `cu_seqlens`, or `num_seqs` rows of
    `max_seqlen` tokens each. For rows `cu_seqlens` is None, and nothing has to be read
    from the device.
    """

    num_seqs: int
    max_seqlen: int
    cu_seqlens: torch.Tensor | None = None  # [num_seqs + 1]
    ragged_lengths: tuple[int, ...] = ()

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: CuSeqlens) -> "Sequences":
        """Checks `cu_seqlens` and reads it, for which a GPU is waited for.

        Raises:
            TypeError: It is no tensor and cannot be made one.
            ValueError: It has another shape or dtype, or decreases.
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
        """Tokens of each sequence."""
        if self.cu_seqlens is None:
            return (self.max_seqlen,) * self.num_seqs
        return self.ragged_lengths

    def offsets(self, device: torch.device) -> torch.Tensor:
        """int32 `[num_seqs + 1]` for a kernel: where each sequence begins and ends."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.to(device, torch.int32).contiguous()
        rows = torch.arange(self.num_seqs + 1, dtype=torch.int32, device=device)
        return rows * self.max_seqlen


# PyTorch copies these thread-locals to the threads that run backward, where activation
# checkpointing recomputes the forward. It does not copy a ContextVar.
_SEQUENCES_KEY = "vllm.packed_sequences"
_PACKED_NODES_KEY = "vllm.packed_sequences.nodes"
_lock = threading.Lock()
# How many `packed_sequences` are open in all threads. torch.compile guards on this
# number, because it cannot guard on the thread-locals above: a layer that is compiled
# while any thread has packed sequences asks for its own at run time.
_num_active = 0


class _PackedNodes:
    """Which autograd nodes a thread made inside `packed_sequences`.

    PyTorch numbers the nodes that a thread makes. What is kept are ranges of numbers.
    """

    MOST_RANGES = 1024

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, int]] = deque()

    def add(self, start: int, end: int) -> None:
        if self._ranges and self._ranges[-1][1] >= start:
            start = min(start, self._ranges.pop()[0])
        self._ranges.append((start, end))
        if len(self._ranges) > self.MOST_RANGES:
            # The two oldest become one range. Their graphs have most likely been freed.
            # If not, a node between them that counts as packed can raise an error
            # without need, but it never gets a wrong gradient.
            (first, _), (_, last) = self._ranges.popleft(), self._ranges.popleft()
            self._ranges.appendleft((first, last))

    def contain(self, node: torch.autograd.graph.Node) -> bool:
        number = node._sequence_nr()
        return any(start <= number < end for start, end in self._ranges)


def _thread_local(key: str) -> Any:
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def current_sequences() -> Sequences | None:
    """The sequences of the innermost `packed_sequences` of this thread."""
    return _thread_local(_SEQUENCES_KEY)


@contextmanager
def packed_sequences(cu_seqlens: CuSeqlens) -> Iterator[None]:
    """Tells every trainable attention layer called inside where sequences begin.

    A packed batch trains so without `cu_seqlens` in the forward of each module:

        with packed_sequences(cu_seqlens):
            loss = loss_fn(model(input_ids, positions), labels)
            loss.backward()

    `cu_seqlens` is read once, here, for all layers. It applies to this thread and to
    its backward. With activation checkpointing, call `backward()` inside too, because
    it recomputes the forward. A layer that gets `cu_seqlens` as an argument uses that.
    In an engine step `packed_sequences` has no effect.

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

    The node of the first run, for which it runs, was made inside `packed_sequences`.
    """
    if torch._C._current_graph_task_id() == -1:
        return False  # not in backward
    nodes, node = _thread_local(_PACKED_NODES_KEY), torch._C._current_autograd_node()
    return nodes is not None and node is not None and nodes.contain(node)


def sequences_of(rows: Sequences, cu_seqlens: CuSeqlens | None) -> Sequences:
    """The sequences of a batch: by `cu_seqlens`, by `packed_sequences`, or its rows.

    Args:
        rows: The batch, each row a sequence. A packed batch is one row.
        cu_seqlens: int32 `[num_seqs + 1]`, if the caller of the layer passed it.

    Raises:
        TypeError: `cu_seqlens` is no tensor and cannot be made one.
        ValueError: The lengths do not fit the batch.
        RuntimeError: A recomputation in backward runs outside its `packed_sequences`.
    """
    sequences = (
        current_sequences()
        if cu_seqlens is None
        else Sequences.from_cu_seqlens(cu_seqlens)
    )
    if sequences is None:
        if rows.num_seqs == 1 and _recomputes_a_pack():
            # Attention over the pack as one sequence would give wrong gradients.
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
    """Whether torch.compile is tracing a layer whose rows are its sequences."""
    return torch.compiler.is_compiling() and cu_seqlens is None and _num_active == 0


@torch.compiler.disable(reason="reads packed_sequences()")
def current_cu_seqlens() -> torch.Tensor | None:
    """`cu_seqlens` of the innermost `packed_sequences` of this thread."""
    sequences = current_sequences()
    return None if sequences is None else sequences.cu_seqlens
