# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tiny models in every form in which they can be served; the columns of the matrix.

Most features are tried with a Llama. The other families have what a Llama lacks:
sliding windows and soft caps (Gemma 2), attention sinks (gpt-oss), and states beside
attention: Mamba-2 (Falcon-H1), a gated delta rule (Qwen3-Next), short convolutions
(LFM2).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)

from vllm import ModelRegistry
from vllm.model_executor.models.falcon_h1 import FalconH1ForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.model_executor.models.lfm2 import Lfm2ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from llama import Llama, LlamaShape  # noqa: E402

VOCAB, LENGTH = 128, 256
RANK = 4  # of an adapter
SHAPE = LlamaShape(
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCAB,
    rope_theta=10000.0,
    max_position_embeddings=LENGTH,
)
ARCHITECTURE = "FeatureModel"
SIZES: dict[str, Any] = {
    "hidden_size": SHAPE.hidden_size,
    "intermediate_size": SHAPE.intermediate_size,
    "num_hidden_layers": 2,
    "num_attention_heads": SHAPE.num_attention_heads,
    "num_key_value_heads": SHAPE.num_key_value_heads,
    "head_dim": SHAPE.head_dim,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "pad_token_id": None,
}
WINDOWS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
}


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Args:
        native: vLLM's class.
        config: Transformers' config of the tiny one.

    """

    native: type[nn.Module]
    config: Callable[[], PretrainedConfig]

    def transformers(self) -> nn.Module:
        # The engine's dtype, while it builds a model; the config's own is another one.
        dtype = torch.get_default_dtype()
        # Transformers' sdpa leaves out the caps of a config.
        return AutoModelForCausalLM.from_config(
            self.config(), dtype=dtype, attn_implementation="eager"
        )


STATELESS = ("llama", "gemma2", "gpt_oss")
FAMILIES = {
    "llama": Family(
        LlamaForCausalLM, lambda: LlamaConfig(**SHAPE.config("LlamaForCausalLM"))
    ),
    "gemma2": Family(
        Gemma2ForCausalLM,
        lambda: Gemma2Config(
            **SIZES,
            **WINDOWS,
            query_pre_attn_scalar=SHAPE.head_dim,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=10.0,
        ),
    ),
    "gpt_oss": Family(
        GptOssForCausalLM,
        lambda: GptOssConfig(
            **SIZES, **WINDOWS, num_local_experts=4, num_experts_per_tok=2
        ),
    ),
    "falcon_h1": Family(
        FalconH1ForCausalLM,
        lambda: FalconH1Config(
            **SIZES,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_d_ssm=128,
            mamba_chunk_size=16,
        ),
    ),
    "qwen3_next": Family(
        Qwen3NextForCausalLM,
        lambda: Qwen3NextConfig(
            **SIZES,
            layer_types=["linear_attention", "full_attention"],
            mlp_only_layers=[0],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
        ),
    ),
    "lfm2": Family(
        Lfm2ForCausalLM,
        lambda: Lfm2Config(
            **SIZES,
            layer_types=["conv", "full_attention"],
            conv_dim=SHAPE.hidden_size,
            block_dim=SHAPE.hidden_size,
            block_auto_adjust_ff_dim=False,
        ),
    ),
}


def family_of(vllm_config: Any) -> Family:
    return FAMILIES[vllm_config.model_config.hf_config.model_type]


def transformers_module(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """With Transformers' own plan, if ranks divide it."""
    return family_of(vllm_config).transformers()


def plain(vllm_config: Any, parallel_context: Any) -> nn.Module:
    return Llama(SHAPE)


def vllm_layers(vllm_config: Any, parallel_context: Any) -> nn.Module:
    return family_of(vllm_config).native(vllm_config=vllm_config)


def annotated(native: type[nn.Module]) -> Callable[..., nn.Module]:
    """`vllm_layers` with a return annotation that names the class."""

    def build(vllm_config: Any, parallel_context: Any) -> nn.Module:
        return vllm_layers(vllm_config, parallel_context)

    build.__annotations__["return"] = native
    return build


def megatron(vllm_config: Any, parallel_context: Any) -> nn.Module:
    from megatron_llama import MegatronLlama, build

    class FromTransformers(MegatronLlama):
        """Takes Transformers' checkpoint."""

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
                # Each group of query heads stands before its head of keys, of values.
                groups = [
                    given[f"{of}.self_attn.{x}_proj.weight"].unflatten(
                        0, (SHAPE.num_key_value_heads, -1)
                    )
                    for x in "qkv"
                ]  # [groups, outputs of one, hidden]
                qkv = torch.cat(groups, dim=1).flatten(0, 1)
                own[f"{to}.self_attention.linear_qkv.weight"].copy_(qkv)
                copy(f"{to}.input_layernorm", f"{of}.input_layernorm")
                copy(f"{to}.self_attention.linear_proj", f"{of}.self_attn.o_proj")
                copy(f"{to}.pre_mlp_layernorm", f"{of}.post_attention_layernorm")
                gate_and_up = (f"{of}.mlp.{x}_proj" for x in ("gate", "up"))
                copy(f"{to}.mlp.linear_fc1", *gate_and_up)
                copy(f"{to}.mlp.linear_fc2", f"{of}.mlp.down_proj")

    groups = parallel_context.megatron_groups()
    return build(SHAPE, groups, model_cls=FromTransformers)


@dataclass(frozen=True, eq=False)  # hashed by identity
class Column:
    """One form of the models.

    Args:
        title: in the table.
        factory: what is registered; None for vLLM's own class.
        options: of the engine.
        families: those that have this form.
        slow: whether CI leaves it out by default.

    """

    title: str
    factory: Callable[..., nn.Module] | None
    options: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)
    slow: bool = False


NATIVE = Column("vLLM's class", None)
# Workers of their own draw other random numbers than an engine of one process.
NATIVE_DIVIDED = Column("vLLM's class, TP = 2", None, {"tensor_parallel_size": 2})
COLUMNS = [
    Column("a plain module", plain, families=("llama",)),
    Column("Transformers' module, unchanged", transformers_module, families=STATELESS),
    Column("vLLM's layers", vllm_layers),
    Column(
        "a plan, TP = 2",
        transformers_module,
        {"tensor_parallel_size": 2},
        families=STATELESS,
        slow=True,
    ),
    Column("Megatron's layers", megatron, families=("llama",), slow=True),
]


def native_of(column: Column) -> Column:
    """vLLM's own class, in the layout of `column`."""
    return NATIVE_DIVIDED if column.options else NATIVE


def save(folder: Path, column: Column, family: str, dtype: str, seed: int = 0) -> None:
    """A model directory, with the same weights of a `seed` for every column."""
    architecture = FAMILIES[family].native.__name__
    if column.factory is not None:
        architecture = ARCHITECTURE
        factory = column.factory
        if factory is vllm_layers:  # vLLM asks the class about its states
            factory = annotated(FAMILIES[family].native)
        ModelRegistry.register_model(ARCHITECTURE, factory)
    torch.manual_seed(seed)  # of what `randomize` leaves, such as sinks
    model = FAMILIES[family].transformers()
    randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    config = FAMILIES[family].config().to_dict()
    config |= {"architectures": [architecture], "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights with which tokens are likely enough that rounding changes none."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # [out, in]
            scale = 2.0 * parameter.shape[-1] ** -0.5
            parameter.normal_(std=scale, generator=generator)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(std=1.0, generator=generator)


def save_adapter(folder: Path, column: Column, seed: int) -> None:
    """An adapter of a Llama in PEFT's format, with the same values for every column."""
    names = ["self_attn.o_proj", "mlp.down_proj"]
    if column.factory is megatron:
        names = ["self_attention.linear_proj", "mlp.linear_fc2"]
    layers = "decoder.layers" if column.factory is megatron else "model.layers"
    generator = torch.Generator().manual_seed(seed)
    widths = (SHAPE.num_attention_heads * SHAPE.head_dim, SHAPE.intermediate_size)
    factors = {}
    for layer in range(SHAPE.num_hidden_layers):
        for name, width in zip(names, widths, strict=True):
            path = f"base_model.model.{layers}.{layer}.{name}"
            a = torch.randn(RANK, width, generator=generator)
            b = torch.randn(SHAPE.hidden_size, RANK, generator=generator)
            factors[f"{path}.lora_A.weight"] = a * width**-0.5
            factors[f"{path}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [name.rpartition(".")[2] for name in names],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word `t<i>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"t{i}": i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)
