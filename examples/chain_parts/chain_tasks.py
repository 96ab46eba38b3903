# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The chain's two tasks: to reverse five digits, and to add 1 to each as well."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIGITS, END, EQUALS = 5, 10, 11
WORDS = [*"0123456789", ".", "="]
PROMPT = DIGITS + 1  # its tokens, and those of a right answer


def problems(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(10, (count, DIGITS), generator=generator)
    return [[*row, EQUALS] for row in digits.tolist()]


def reversed_digits(prompt: list[int]) -> list[int]:
    return [*reversed(prompt[:-1]), END]


def next_digits(prompt: list[int]) -> list[int]:
    """Reversed, with 1 added to each; 0 comes after 9."""
    return [*((digit + 1) % 10 for digit in reversed(prompt[:-1])), END]


def reward(prompt: list[int], answer: list[int]) -> float:
    """The share of tokens that are right."""
    right = reversed_digits(prompt)
    return sum(a == b for a, b in zip(answer, right, strict=False)) / len(right)


def write_tokenizer(directory: Path) -> None:
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".").save_pretrained(
        directory
    )
