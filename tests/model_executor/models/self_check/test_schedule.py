# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""In which pieces the self-check's prompts are read."""

import pytest

from vllm.model_executor.models.self_check.schedule import Piece, steps_of, token_ids


@pytest.mark.parametrize(
    "lengths, max_tokens", [([41, 23], 2048), ([41, 23], 8), ([41], 16), ([8, 8], 2)]
)
def test_every_token_is_read_once_and_in_order(lengths, max_tokens):
    steps = steps_of(lengths, max_tokens)
    for request, length in enumerate(lengths):
        pieces = [p for step in steps for p in step if p.request == request]
        read = [token for p in pieces for token in range(p.start, p.end)]
        assert read == list(range(length))
        assert len(pieces) >= 5 and all(p.is_decode for p in pieces[-3:])
    for step in steps:
        assert sum(piece.tokens for piece in step) <= max_tokens
        # as vLLM orders a batch
        assert step == sorted(step, key=lambda piece: not piece.is_decode)


def test_a_chunk_of_one_request_is_beside_a_decode_step_of_another():
    steps = steps_of([41, 23], 2048)
    assert [Piece(0, 38, 39), Piece(1, 10, 20)] in steps


def test_of_a_long_piece_both_ends_are_compared():
    assert Piece(0, 3, 30).compared() == list(range(3, 30))
    compared = Piece(0, 0, 500).compared()
    assert compared == [*range(8), *range(492, 500)]


def test_tokens_are_ordinary_and_the_same_on_every_rank():
    ids = token_ids(200, 10, special={0, 9}, seed=1)
    assert set(ids.tolist()) == set(range(1, 9))
    assert ids.equal(token_ids(200, 10, special={0, 9}, seed=1))
    assert not ids.equal(token_ids(200, 10, special={0, 9}, seed=2))
