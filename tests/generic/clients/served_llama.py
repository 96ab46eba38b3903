# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Hugging Face's Llama as a registered model, small, with a tokenizer of characters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vllm import ModelRegistry
from vllm.model_executor.layers import TrainableAttention

VOCABULARY = ["<pad>", "<eos>", *"0123456789+="]
ATTENTION = "trainable"


class ServedLlama(LlamaForCausalLM):
    """Llama as a trainer has it, with the attention layer and the axes of an engine."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.served = TrainableAttention(
                config.num_attention_heads,
                layer.self_attn.head_dim,
                config.num_key_value_heads,
            )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        outputs = self.model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False
        )
        return outputs.last_hidden_state[0]


def attend(
    layer: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's interface: `[batch, heads, seq, head_dim]` in, heads third out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return layer.served(q, k, v), None


def register() -> None:
    AttentionInterface.register(ATTENTION, attend)

    def factory(vllm_config: Any, parallel_context: Any) -> nn.Module:
        config = vllm_config.model_config.hf_config
        config._attn_implementation = ATTENTION
        return ServedLlama(config)

    ModelRegistry.register_model(
        "LlamaForCausalLM", factory, supports_torch_compile=False
    )


def save(directory: Path, **options: Any) -> None:
    """A Llama with random weights, in float32, and its tokenizer."""
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(directory)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": vocabulary["<pad>"],
        "eos_token_id": vocabulary["<eos>"],
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes | options)).save_pretrained(directory)
