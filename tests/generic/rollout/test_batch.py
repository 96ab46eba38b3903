# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prompts, the tensors of a batch, and rewards: what needs no engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from vllm_generic.rollout import PromptDataset, Sample, collate, score


class Letters:
    """A tokenizer: a is 1, b is 2, and so on."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]


ROWS: list[dict[str, Any]] = [
    {"prompt": "ab", "answer": 3},
    {"prompt": "c", "answer": 4},
]


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    for rows in (ROWS, jsonl, str(jsonl), datasets.Dataset.from_list(ROWS)):
        data = PromptDataset(rows, 8, Letters())
        assert PromptDataset.collate(data.items) == {
            "prompt": ["ab", "c"],
            "input_ids": [[1, 2], [3]],
            "answer": [3, 4],
            "prompt_index": [0, 1],
        }
    assert PromptDataset(["ab"], 8, Letters())[0]["input_ids"] == [1, 2]
    assert PromptDataset([[5, 6]], 8)[0]["input_ids"] == [5, 6]
    renamed = PromptDataset([{"ids": [1]}], 8, input_ids_key="ids")
    assert renamed[0]["input_ids"] == [1]


def test_prompts_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Prompt 1 has 3 tokens; expected at most 2"):
        PromptDataset(["ab", "abc"], 2, Letters())
    kept = PromptDataset(["abc", "ab"], 2, Letters(), drop_overlong=True)
    assert [item["prompt_index"] for item in kept.items] == [1]
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        PromptDataset([[]], 2)
    with pytest.raises(ValueError, match="Prompt 0 is a text, and the engine has no"):
        PromptDataset(["ab"], 2)
    with pytest.raises(ValueError, match=r"Prompt 0 has the columns \['question'\]"):
        PromptDataset([{"question": "ab"}], 2, Letters())
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt"')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        PromptDataset(file, 2, Letters())


def batch() -> dict[str, Any]:
    turns = Sample(0, "ab", [1, 2], [7, 8, 9], [-1, 0, -3], [True, False, True])
    turns.versions, turns.text = [0, -1, 1], "ghi"
    empty = Sample(1, "c", [3], prompt_logprobs=[])
    return collate([turns, empty], pad_token_id=0)


def test_the_tensors_of_a_batch() -> None:
    """One answer of two turns, and an empty one."""
    found = batch()
    assert found["all_tokens"].tolist() == [[1, 2, 7, 8, 9], [3, 0, 0, 0, 0]]
    assert found["logprobs"].tolist() == [[0, -1, 0, -3], [0, 0, 0, 0]]
    assert found["loss_mask"].tolist() == [[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    assert found["weight_versions"].tolist() == [[-1, -1, 0, -1, 1], [-1] * 5]
    assert found["lengths"].tolist() == [5, 1]
    assert found["prompt_index"].tolist() == [0, 1]
    assert [ids.tolist() for ids in found["no_padded_query_ids"]] == [[1, 2], [3]]
    assert found["str_outputs"] == ["ghi", ""]
    sample = Sample(4, None, [1, 2], [3], [-1.0], [True], [0], prompt_logprobs=[-2.0])
    found = collate([sample], pad_token_id=0, length=6)
    assert found["logprobs"].tolist() == [[-2, -1, 0, 0, 0]]
    with pytest.raises(ValueError, match="prompt 4 makes 3 tokens"):
        collate([sample], pad_token_id=0, length=2)
    nothing = collate([], pad_token_id=0)
    assert nothing["all_tokens"].shape == (0, 0)


def test_rewards() -> None:
    data = {"answer": [3, 4]}
    seen = []

    def reward(row: dict[str, Any]) -> float:
        seen.append(row)
        return row["answer"] - len(row["output_ids"])

    assert torch.equal(score(reward, batch(), data), torch.tensor([0.0, 4.0]))
    assert seen[0]["output"] == "ghi" and seen[0]["output_ids"] == [7, 8, 9]
    assert score(reward, collate([], 0), data).shape == (0,)


def test_rewards_that_fail() -> None:
    data = {"answer": [3, 4]}
    with pytest.raises(RuntimeError, match=r"prompt 1 of .* \(row 1\).*KeyError"):
        score(lambda row: {3: 1.0}[row["answer"]], batch(), data, workers=2)
    with pytest.raises(RuntimeError, match="prompt 0 of the batch.*: nan"):
        score(lambda row: float("nan"), batch(), data)
    forever = threading.Event()
    with pytest.raises(TimeoutError, match="reward of prompt 1 of the batch"):
        score(
            lambda row: 1.0 if row["answer"] == 3 else forever.wait(),
            batch(),
            data,
            timeout=0.2,
        )
    forever.set()
