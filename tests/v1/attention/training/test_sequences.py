# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What kernels read of the sequences; what layers make of them is tested there."""

import pytest
import torch

from vllm.v1.attention.training.sequences import Sequences, _PackedNodes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "rows, expected",
    [((3, 5), [0, 5, 10, 15]), ((1, 4), [0, 4]), ((2, 0), [0, 0, 0]), ((0, 7), [0])],
)
def test_offsets_of_rows(rows: tuple[int, int], expected: list[int]) -> None:
    sequences = Sequences(*rows)
    offsets = sequences.offsets(CPU)
    assert offsets.dtype == torch.int32 and offsets.tolist() == expected
    assert sequences.lengths == (rows[1],) * rows[0]


def test_offsets_of_ragged_sequences_are_contiguous_int32() -> None:
    cu_seqlens = torch.tensor([[0, 9], [2, 9], [7, 9]])[:, 0]
    sequences = Sequences.from_cu_seqlens(cu_seqlens)
    offsets = sequences.offsets(CPU)
    assert offsets.dtype == torch.int32 and offsets.is_contiguous()
    assert offsets.tolist() == [0, 2, 7] and sequences.lengths == (2, 5)
    assert (sequences.num_seqs, sequences.max_seqlen) == (2, 5)


def test_a_thread_keeps_a_bounded_number_of_ranges() -> None:
    class Node:
        def __init__(self, number: int) -> None:
            self._sequence_nr = lambda: number

    nodes = _PackedNodes()
    for i in range(nodes.MOST_RANGES + 5):
        nodes.add(10 * i, 10 * i + 5)
    assert len(nodes._ranges) == nodes.MOST_RANGES
    last = 10 * (nodes.MOST_RANGES + 4)
    assert nodes.contain(Node(0)) and nodes.contain(Node(last + 4))
    assert nodes.contain(Node(7))  # on the safe side, between the oldest
    assert not nodes.contain(Node(last + 5)) and not nodes.contain(Node(last - 2))
    nodes.add(last - 20, last + 9)  # an outer block ends after those in it
    assert nodes.contain(Node(last - 18)) and nodes.contain(Node(last + 8))
