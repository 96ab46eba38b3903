# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prompts from lists, JSONL files and `datasets` sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset

Prompts = str | Path | Iterable[str | Sequence[int] | Mapping[str, Any]]
Item = dict[str, Any]


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...


class PromptDataset(Dataset[Item]):
    """Prompts with their tokens, and whatever else their rows hold.

    An item has `prompt` (the text, or "" if only tokens were given), `input_ids` (a
    list), `prompt_index` (its position among all prompts), and the row's other columns.

    Args:
        prompts: Texts, lists of token ids, or rows; or the path of a JSONL file of
            rows; or a `datasets.Dataset`.
        max_prompt_length: How many tokens a prompt may have.
        tokenizer: For texts.
        prompt_key: The column of a row that holds the text.
        input_ids_key: The column that holds token ids; it is used before the text.
        drop_overlong: Leave prompts out that are too long, instead of raising.

    Raises:
        ValueError: a prompt is empty or too long, or a row has none.

    """

    def __init__(
        self,
        prompts: Prompts,
        max_prompt_length: int,
        tokenizer: Tokenizer | None = None,
        *,
        prompt_key: str = "prompt",
        input_ids_key: str = "input_ids",
        drop_overlong: bool = False,
    ) -> None:
        self.items: list[Item] = []
        for index, given in enumerate(_rows(prompts)):
            item = self._item(given, index, tokenizer, prompt_key, input_ids_key)
            length = len(item["input_ids"])
            if length == 0:
                raise ValueError(f"Prompt {index} is empty; expected at least a token.")
            if length <= max_prompt_length:
                self.items.append(item)
            elif not drop_overlong:
                raise ValueError(
                    f"Prompt {index} has {length} tokens; expected at most "
                    f"{max_prompt_length}. Shorten it, raise seq_length, or set "
                    "overlong_prompts: drop."
                )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    @staticmethod
    def collate(items: Sequence[Item]) -> dict[str, list[Any]]:
        """A batch for `VLLMModule.forward_step`: each column as a list."""
        return {key: [item[key] for item in items] for key in items[0]}

    @staticmethod
    def _item(
        given: Any,
        index: int,
        tokenizer: Tokenizer | None,
        prompt_key: str,
        input_ids_key: str,
    ) -> Item:
        row = given
        if not isinstance(given, Mapping):
            row = {prompt_key if isinstance(given, str) else input_ids_key: given}
        if prompt_key not in row and input_ids_key not in row:
            raise ValueError(
                f"Prompt {index} has the columns {sorted(row)}; expected "
                f"{prompt_key!r} or {input_ids_key!r}. Name yours by "
                "vllm_prompt_key or vllm_input_ids_key."
            )
        text, input_ids = row.get(prompt_key), row.get(input_ids_key)
        if input_ids is None:
            if tokenizer is None:
                raise ValueError(
                    f"Prompt {index} is a text, and the engine has no tokenizer. "
                    "Name one by the key tokenizer, or give token ids."
                )
            input_ids = tokenizer.encode(text)
        rest = {k: v for k, v in row.items() if k not in (prompt_key, input_ids_key)}
        ids = [int(token) for token in input_ids]
        return rest | {"prompt": text or "", "input_ids": ids, "prompt_index": index}


def _rows(prompts: Prompts) -> Iterable[Any]:
    if not isinstance(prompts, (str, Path)):
        yield from prompts
        return
    with open(prompts, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{prompts}, line {number} is no JSON: {error}"
                ) from None
