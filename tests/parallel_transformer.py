# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A transformer of vLLM's parallel layers, and the same in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.parallel_context import ParallelContext

VOCAB = 130  # padded to 192, so that the last of 4 ranks has padding only
HEADS = 4
KV_HEADS = 2  # at TP=4 each is held by two ranks
HEAD_DIM = 32
HIDDEN = 64
INTERMEDIATE = 96
LAYERS = 2
POSITIONS = 64

CONFIG = {
    "architectures": ["ParallelTransformer"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
}


class ParallelBlock(nn.Module):
    """Every kind of parallel linear layer, with biases."""

    def __init__(self, tensor_parallel_size: int) -> None:
        super().__init__()
        self.heads = HEADS // tensor_parallel_size
        self.kv_heads = max(1, KV_HEADS // tensor_parallel_size)
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.qkv = QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, KV_HEADS)
        self.attention = TrainableAttention(self.heads, HEAD_DIM, self.kv_heads)
        self.out = RowParallelLinear(HEADS * HEAD_DIM, HIDDEN)
        self.mlp_norm = nn.RMSNorm(HIDDEN)
        self.gate_up = MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2)
        self.down = RowParallelLinear(INTERMEDIATE, HIDDEN, bias=False)
        self.mix = ReplicatedLinear(HIDDEN, HIDDEN)
        self.widen = ColumnParallelLinear(HIDDEN, 2 * HIDDEN, gather_output=True)
        self.narrow = RowParallelLinear(2 * HIDDEN, HIDDEN, input_is_parallel=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.heads * HEAD_DIM] + [self.kv_heads * HEAD_DIM] * 2
        qkv = self.qkv(self.attention_norm(x))[0]  # [..., heads * head_dim], fused
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in qkv.split(sizes, -1))
        x = x + self.out(self.attention(q, k, v).flatten(-2))[0]
        gate, up = self.gate_up(self.mlp_norm(x))[0].chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)[0]
        return x + self.narrow(self.widen(self.mix(x)[0])[0].tanh())[0]


class ParallelTransformer(nn.Module):
    def __init__(self, context: ParallelContext, tied: bool = False) -> None:
        super().__init__()
        size = context.get_tensor_parallel_world_size()
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN)
        self.layers = nn.ModuleList(ParallelBlock(size) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN, bias=True)
        if tied:
            self.lm_head.tie_weights(self.embedding)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids) + self.positions(positions)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def build(vllm_config: object, context: ParallelContext) -> ParallelTransformer:
    return ParallelTransformer(context)


def reference_hidden(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of `ids` `[batch, seq]`, by PyTorch's operators alone."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN,), w[f"{name}.weight"])

    x = w["embedding.weight"][ids] + w["positions.weight"][: ids.shape[1]]
    for i in range(LAYERS):
        layer = f"layers.{i}"
        qkv = linear(f"{layer}.qkv", norm(f"{layer}.attention_norm", x))
        # [batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]
        q, k, v = (
            part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for part in qkv.split(
                [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1
            )
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(f"{layer}.out", out.transpose(1, 2).flatten(-2))
        gate, up = linear(f"{layer}.gate_up", norm(f"{layer}.mlp_norm", x)).chunk(2, -1)
        x = x + linear(f"{layer}.down", F.silu(gate) * up)
        wide = linear(f"{layer}.widen", linear(f"{layer}.mix", x)).tanh()
        x = x + linear(f"{layer}.narrow", wide)
    return norm("norm", x)


def whole_weights(tied: bool = False) -> dict[str, torch.Tensor]:
    """Weights of one device, the same on every call, by the model's names."""
    shapes = {
        "embedding.weight": (VOCAB, HIDDEN),
        "positions.weight": (POSITIONS, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"layers.{i}"
        for name, rows, columns, bias in (
            ("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, True),
            ("out", HIDDEN, HEADS * HEAD_DIM, True),
            ("gate_up", 2 * INTERMEDIATE, HIDDEN, True),
            ("down", HIDDEN, INTERMEDIATE, False),
            ("mix", HIDDEN, HIDDEN, True),
            ("widen", 2 * HIDDEN, HIDDEN, True),
            ("narrow", HIDDEN, 2 * HIDDEN, True),
        ):
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        shapes[f"{layer}.attention_norm.weight"] = (HIDDEN,)
        shapes[f"{layer}.mlp_norm.weight"] = (HIDDEN,)
    shapes["norm.weight"] = (HIDDEN,)
    shapes["lm_head.bias"] = (VOCAB,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()
    weights = {
        name: torch.randn(shape, generator=generator, device="cpu")
        for name, shape in shapes.items()
    }
    return {name: w.to(device) * w.shape[-1] ** -0.5 for name, w in weights.items()}
