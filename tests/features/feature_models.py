# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One tiny Llama in every form in which it can be served; the columns of the matrix."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM as NativeLlama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from llama import Llama, LlamaShape  # noqa: E402

VOCAB, LENGTH = 128, 256
SHAPE = LlamaShape(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=VOCAB,
    rope_theta=10000.0,
    max_position_embeddings=LENGTH,
)
ARCHITECTURE = "FeatureLlama"


def config_of(architecture: str) -> dict[str, Any]:
    return SHAPE.config(architecture) | {"torch_dtype": "float32"}


def transformers_llama(vllm_config: Any, parallel_context: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**config_of("LlamaForCausalLM")))


def plain(vllm_config: Any, parallel_context: Any) -> nn.Module:
    return Llama(SHAPE)


def vllm_layers(vllm_config: Any, parallel_context: Any) -> NativeLlama:
    return NativeLlama(vllm_config=vllm_config)


def plan(vllm_config: Any, parallel_context: Any) -> nn.Module:
    module = transformers_llama(vllm_config, parallel_context)
    return module  # Transformers' own plan


def megatron(vllm_config: Any, parallel_context: Any) -> nn.Module:
    from megatron_llama import MegatronLlama, build

    class FromTransformers(MegatronLlama):
        """Takes Transformers' checkpoint; of one group of keys and values."""

        @torch.no_grad()
        def load_weights(self, weights: Any) -> None:
            given = dict(weights)
            own = dict(self.named_parameters())

            def copy(name: str, *parts: str) -> None:
                own[f"{name}.weight"].copy_(
                    torch.cat([given[f"{part}.weight"] for part in parts])
                )

            copy("embedding.word_embeddings", "model.embed_tokens")
            copy("decoder.final_layernorm", "model.norm")
            copy("output_layer", "lm_head")
            for i in range(SHAPE.num_hidden_layers):
                to, of = f"decoder.layers.{i}", f"model.layers.{i}"
                projections = (f"{of}.self_attn.{x}_proj" for x in "qkv")
                copy(f"{to}.input_layernorm", f"{of}.input_layernorm")
                copy(f"{to}.self_attention.linear_qkv", *projections)
                copy(f"{to}.self_attention.linear_proj", f"{of}.self_attn.o_proj")
                copy(f"{to}.pre_mlp_layernorm", f"{of}.post_attention_layernorm")
                gate_and_up = (f"{of}.mlp.{x}_proj" for x in ("gate", "up"))
                copy(f"{to}.mlp.linear_fc1", *gate_and_up)
                copy(f"{to}.mlp.linear_fc2", f"{of}.mlp.down_proj")

    groups = parallel_context.process_group_collection()
    return build(SHAPE, groups, model_cls=FromTransformers)


@dataclass(frozen=True)
class Column:
    """One form of the model.

    Args:
        title: in the table.
        factory: what is registered; None for vLLM's own class.
        options: of the engine.
        slow: whether CI leaves it out by default.

    """

    title: str
    factory: Callable[..., nn.Module] | None
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False


NATIVE = Column("vLLM's class", None)
COLUMNS = [
    Column("a plain module", plain),
    Column("Transformers' Llama, unchanged", transformers_llama),
    Column("vLLM's layers", vllm_layers),
    Column("a plan, TP = 2", plan, {"tensor_parallel_size": 2}, slow=True),
    Column("Megatron's layers", megatron, slow=True),
]


def save(folder: Path, column: Column) -> None:
    """A model directory with the same weights for every column."""
    architecture = ARCHITECTURE if column.factory is not None else "LlamaForCausalLM"
    generator = torch.Generator().manual_seed(0)
    model = transformers_llama(None, None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # [out, in]; a decided argmax
                scale = 2.0 * parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale, generator=generator)
        model.model.embed_tokens.weight.normal_(std=1.0, generator=generator)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_of(architecture)))
    tokenizer().save_pretrained(folder)
    if column.factory is not None:
        ModelRegistry.register_model(ARCHITECTURE, column.factory)


def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word `t<i>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"t{i}": i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)
