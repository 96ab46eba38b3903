# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A Llama around `TrainableAttention`, for the benchmarks.

`Llama` is of plain PyTorch layers, or of vLLM's parallel ones under tensor or pipeline
parallelism. Checkpoints are Hugging Face's, so that vLLM's native class reads them too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.parallel_context import ParallelContext


@dataclass(frozen=True)
class LlamaShape:
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 128256
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192

    def config(self, architecture: str) -> dict[str, Any]:
        """The `config.json` of `architecture`."""
        config = dict(vars(self))
        config["rope_parameters"] = {
            "rope_theta": config.pop("rope_theta"),
            "rope_type": "default",
        }
        return config | {
            "architectures": [architecture],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


LLAMA_1B = LlamaShape()
# The same size with heads of 128.
LLAMA_1B_HEAD_128 = replace(
    LLAMA_1B, num_attention_heads=16, num_key_value_heads=4, head_dim=128
)


LLAMA_8B = LlamaShape(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    head_dim=128,
)
# What tensor parallelism divides of a plain `Llama`, for a trainer that is not divided.
DIVIDED = {
    "model.layers.*.self_attn.qkv_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_rep",
}
# The place of a checkpoint's matrix in the module: parameter, and part of it.
STACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class RMSNorm(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)  # of [tokens, heads, head_dim]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape, layer: int, tp_size: int) -> None:
        super().__init__()
        hidden, heads = shape.hidden_size, shape.num_attention_heads
        kv_heads, head_dim = shape.num_key_value_heads, shape.head_dim
        self.qkv_proj: nn.Module
        self.o_proj: nn.Module
        if tp_size == 1:
            width = (heads + 2 * kv_heads) * head_dim
            self.qkv_proj = nn.Linear(hidden, width, bias=False)
            self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        else:
            self.qkv_proj = QKVParallelLinear(
                hidden, head_dim, heads, kv_heads, bias=False, return_bias=False
            )
            self.o_proj = RowParallelLinear(
                heads * head_dim, hidden, bias=False, return_bias=False
            )
        self.heads, self.kv_heads = heads // tp_size, kv_heads // tp_size
        self.attn = TrainableAttention(
            self.heads,
            head_dim,
            self.kv_heads,
            prefix=f"model.layers.{layer}.self_attn.attn",
        )

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.attn.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        out = self.attn(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: LlamaShape, tp_size: int) -> None:
        super().__init__()
        hidden, width = shape.hidden_size, shape.intermediate_size
        self.gate_up_proj: nn.Module
        self.down_proj: nn.Module
        if tp_size == 1:
            self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False)
            self.down_proj = nn.Linear(width, hidden, bias=False)
        else:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden, [width, width], bias=False, return_bias=False
            )
            self.down_proj = RowParallelLinear(
                width, hidden, bias=False, return_bias=False
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: LlamaShape, layer: int, tp_size: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape, layer, tp_size)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = MLP(shape, tp_size)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The layers of one pipeline stage, under their global numbers."""

    def __init__(self, shape: LlamaShape, context: ParallelContext) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = shape.head_dim, shape.rope_theta
        tp_size = context.tensor_parallel_size
        if context.is_first_stage:
            self.embed_tokens = (
                nn.Embedding(shape.vocab_size, shape.hidden_size)
                if tp_size == 1
                else VocabParallelEmbedding(shape.vocab_size, shape.hidden_size)
            )
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(shape, layer, tp_size)
                for layer in context.layer_range(shape.num_hidden_layers)
            }
        )
        self.norm = RMSNorm(shape) if context.is_last_stage else nn.Identity()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # In each call and in float32, so that .to(bfloat16) cannot round them.
        even = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32)
        angles = positions[:, None] * self.rope_theta ** (-even / self.head_dim)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers.values():
            x = layer(x, cos, sin)  # [tokens, hidden]
        return self.norm(x)


class Llama(nn.Module):
    """`[tokens]` ids and positions -> hidden states `[tokens, hidden]`."""

    def __init__(
        self, shape: LlamaShape, context: ParallelContext | None = None
    ) -> None:
        super().__init__()
        context = context or ParallelContext()
        self.model = Decoder(shape, context)
        if context.is_last_stage:
            self.lm_head = (
                nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
                if context.tensor_parallel_size == 1
                else ParallelLMHead(shape.vocab_size, shape.hidden_size)
            )
        self.shape = shape

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Stack Hugging Face's matrices; each rank keeps its shard."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, weight in weights:
            projection = name.split(".")[-2]
            target, part = STACKED.get(projection, (projection, None))
            name = name.replace(projection, target)
            if name not in parameters:
                continue  # another stage's
            parameter = parameters[name]
            if hasattr(parameter, "weight_loader"):
                which = {"qkv_proj": "qkv"}.get(target, (0, 1))
                shard = () if part is None else (which[part],)
                parameter.weight_loader(parameter, weight, *shard)
            elif part is None:
                parameter.copy_(weight)
            else:
                parameter.split(self.parts(target))[part].copy_(weight)
            loaded.add(name)
        return loaded

    def parts(self, name: str) -> list[int]:
        """Rows of the matrices that are stacked in `name`."""
        shape = self.shape
        kv_width = shape.num_key_value_heads * shape.head_dim
        if name == "qkv_proj":
            return [shape.num_attention_heads * shape.head_dim, kv_width, kv_width]
        return [shape.intermediate_size] * 2

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The state dict under Hugging Face's names; of plain layers only."""
        stacked: dict[str, dict[int, str]] = {}
        for name, (target, part) in STACKED.items():
            stacked.setdefault(target, {})[part] = name
        weights = {}
        for name, weight in self.state_dict().items():
            target = name.split(".")[-2]
            if target not in stacked:
                weights[name] = weight
                continue
            for part, rows in enumerate(weight.split(self.parts(target))):
                weights[name.replace(target, stacked[target][part])] = rows
        return weights
