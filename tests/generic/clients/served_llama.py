# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Transformers' Llama as a registered model, small, with a tokenizer of characters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vllm import ModelRegistry

VOCABULARY = ["<pad>", "<eos>", *"0123456789+="]


def register() -> None:
    """Transformers' own class, with nothing about it changed."""
    ModelRegistry.register_model(
        "LlamaForCausalLM",
        lambda vllm_config, parallel_context: LlamaForCausalLM(
            vllm_config.model_config.hf_config
        ),
    )


def save_tokenizer(directory: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(directory)


def save(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """A Llama with random weights, and its tokenizer. `config.json` names the dtype."""
    save_tokenizer(directory)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": VOCABULARY.index("<pad>"),
        "eos_token_id": VOCABULARY.index("<eos>"),
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes | options))
    model.to(dtype).save_pretrained(directory)
