# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Real English without a download: the prose of CPython's own reference manual."""

import re
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_paragraphs() -> list[str]:
    """The manual's paragraphs of prose, each once and on one line.

    Headings, tables, grammar and code are left out: a paragraph begins and ends
    like a sentence, and most of it is plain lower-case words.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(paragraph: str) -> bool:
    words = re.findall(r"(?<!\S)[a-z]+(?![^\s.,:;])", paragraph)
    sentence = re.fullmatch(r"[A-Z*\"“(].{60,}[.:)]", paragraph)
    return sentence is not None and len(words) > 0.55 * len(paragraph.split())


def train_tokenizer(
    paragraphs: list[str], vocab_size: int, directory: Path
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab_size` tokens, saved for vLLM to load."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(paragraphs, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(directory)
    return tokenizer
