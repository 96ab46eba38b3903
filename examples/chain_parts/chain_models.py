# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The models that the chain is tried with, and how each is called, saved and served.

Nothing of a model is written for vLLM. What a chain needs of one is in a subclass of
`Subject`, and the registered callable is the function that its `factory` names.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from chain_tasks import END, WORDS, write_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm.model_executor.layers.trainable_attention import packed_sequences

Weights = dict[str, torch.Tensor]
LLAMA = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=END,
    eos_token_id=END,
    dtype="float32",
)
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rope_theta=500000.0,
    max_position_embeddings=64,
    bos_token_id=END,
    eos_token_id=END,
    dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the Llama, and the learning rates that suit them."""

    llama: LlamaConfig
    pretrain_lr: float
    lr: float
    adapter_lr: float


SHAPES = {
    "tiny": Shape(LLAMA, 2e-3, 2e-4, 5e-3),
    "1b": Shape(LLAMA_1B, 2e-4, 5e-6, 1e-3),
}


class Subject:
    """Transformers' own Llama.

    Args:
        shape: of the Llama; other models have one size.
        dtype: in which it is served.

    """

    architecture = "LlamaForCausalLM"
    factory = "chain_models:build_llama"

    def __init__(self, shape: Shape = SHAPES["tiny"], dtype: str = "float32") -> None:
        self.shape, self.dtype = shape, dtype

    def make(self) -> nn.Module:
        """The trainer's module, with random weights in float32."""
        return AutoModelForCausalLM.from_config(self.shape.llama)

    def logits(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Of `[batch, seq]`: `[batch, seq, vocab]`."""
        return model(tokens).logits

    def config(self) -> dict[str, Any]:
        own = {"architectures": [self.architecture], "dtype": self.dtype}
        return self.shape.llama.to_dict() | own

    def save(self, weights: Weights, directory: Path) -> None:
        """The directory that `vllm serve` reads, of a whole state dict."""
        _write(self.config(), weights, directory)

    def save_for_service(self, weights: Weights, directory: Path) -> None:
        """The directory that the LoRA service reads: Hugging Face's."""
        self.save(weights, directory)


def build_llama(vllm_config: Any, parallel_context: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(vllm_config.model_config.hf_config)


def _write(config: dict[str, Any], weights: Weights, directory: Path) -> None:
    dtype = getattr(torch, config["dtype"])
    whole = {name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}
    whole = {name: tensor.contiguous() for name, tensor in whole.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)


# ---- A GPT with the names of nanoGPT's ---------------------------------------------


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 512
    vocab_size: int = len(WORDS)
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [batch, seq, 3 * width] -> three of [batch, heads, seq, head_dim]
        parts = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """It counts its positions, ties its head, and without targets returns one token's
    logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = idx.shape[1]
        assert tokens <= self.config.block_size
        x = self.transformer.wte(idx)
        x = x + self.transformer.wpe(torch.arange(tokens, device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class NanoGPT(Subject):
    """Learned positions are counted by the model, and the head shares a weight."""

    architecture = "GPT"
    factory = "chain_models:build_gpt"

    def make(self) -> nn.Module:
        return GPT(GPTConfig())

    def logits(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, targets=tokens)[0]

    def config(self) -> dict[str, Any]:
        own = GPTConfig()
        return dataclasses.asdict(own) | {
            "architectures": [self.architecture],
            "hidden_size": own.n_embd,
            "num_attention_heads": own.n_head,
            "num_hidden_layers": own.n_layer,
            "max_position_embeddings": own.block_size,
            "dtype": self.dtype,
        }


def build_gpt(vllm_config: Any, parallel_context: Any) -> nn.Module:
    config = vllm_config.model_config.hf_config
    names = [field.name for field in dataclasses.fields(GPTConfig)]
    return GPT(GPTConfig(**{name: getattr(config, name) for name in names}))


# ---- megatron-core's GPTModel ------------------------------------------------------


class Megatron(Subject):
    """GPTModel as the LoRA service builds it, of the same shape as the Llama."""

    architecture = "MegatronGPT"
    factory = "chain_models:build_megatron"

    def make(self) -> nn.Module:
        from vllm_generic.tink.backends.megatron_trainer import megatron_model

        model = megatron_model(super().make())
        return model.train().requires_grad_()

    def logits(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        batch, seq = tokens.shape
        device = tokens.device
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * seq
        with packed_sequences(bounds):
            positions = torch.arange(seq, device=device).repeat(batch)
            hidden = model(tokens.flatten(), positions)  # [batch * seq, hidden]
        return model.compute_logits(hidden).unflatten(0, (batch, seq))

    def save_for_service(self, weights: Weights, directory: Path) -> None:
        """Under Hugging Face's names: the service makes a GPTModel of them again."""
        from vllm_generic.tink.backends.megatron_names import Names

        names = Names(self.shape.llama)
        found = {}
        for name, parts in names.parts.items():
            if (whole := weights.get(f"{name}.weight")) is None:
                continue
            rows = names.rows(name) or [torch.arange(len(whole))]
            for part, index in zip(parts, rows, strict=True):
                found[f"{part}.weight"] = whole[index]
        Subject(self.shape, self.dtype).save(found, directory)


def build_megatron(vllm_config: Any, parallel_context: Any) -> nn.Module:
    from vllm_generic.tink.backends.megatron_trainer import MegatronModel

    return MegatronModel(vllm_config.model_config.hf_config, parallel_context)


SUBJECTS: dict[str, type[Subject]] = {
    "llama": Subject,
    "nanogpt": NanoGPT,
    "megatron": Megatron,
}
