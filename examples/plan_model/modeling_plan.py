# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plain pre-LN transformer for one device, and the plans that make it parallel.

This file is in the directory of `config.json`, whose `auto_map` names the class.
"""

import torch
from torch import nn

from vllm.model_executor.layers import TrainableAttention


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.query_linear = nn.Linear(hidden, hidden)
        self.key_linear = nn.Linear(hidden, hidden)
        self.value_linear = nn.Linear(hidden, hidden)
        self.attention = TrainableAttention(heads, hidden // heads)
        self.output_linear = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [..., heads * head_dim]: all heads, or those of this rank
        q, k, v = self.query_linear(x), self.key_linear(x), self.value_linear(x)
        return self.output_linear(self.attention(q, k, v))


class Feedforward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, 4 * hidden)
        self.down_proj = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class PreLNLayer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.feedforward = Feedforward(hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class LayerStack(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                str(index): PreLNLayer(config.hidden_size, config.num_attention_heads)
                for index in range(config.num_hidden_layers)
            }
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            hidden_states = layer(hidden_states)
        return self.layer_norm(hidden_states)


class InputEncoder(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(
            config.max_position_embeddings, config.hidden_size
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids) + self.positions(positions)


class CausalLM(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.input_encoder = InputEncoder(config)
        self.layer_stack = LayerStack(config)
        self.output_decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.layer_stack(self.input_encoder(input_ids, positions))


class PlanForCausalLM(nn.Module):
    """Tokens `[batch, seq]` in training, `[tokens]` in vLLM -> hidden states."""

    tp_plan = {
        "causal_lm.input_encoder.embedding": "rowwise",
        "causal_lm.layer_stack.layers.*.attention.query_linear": "colwise",
        "causal_lm.layer_stack.layers.*.attention.key_linear": "colwise",
        "causal_lm.layer_stack.layers.*.attention.value_linear": "colwise",
        "causal_lm.layer_stack.layers.*.attention.output_linear": "rowwise",
        "causal_lm.layer_stack.layers.*.feedforward.up_proj": "colwise",
        "causal_lm.layer_stack.layers.*.feedforward.down_proj": "rowwise",
        "causal_lm.output_decoder": "colwise_rep",
    }
    pp_plan = {
        "causal_lm.input_encoder": (["input_ids", "positions"], ["hidden_states"]),
        "causal_lm.layer_stack.layers": (["hidden_states"], ["hidden_states"]),
        "causal_lm.layer_stack.layer_norm": (["hidden_states"], ["hidden_states"]),
        "causal_lm.output_decoder": (["hidden_states"], ["logits"]),
    }
    _no_split_modules = ["PreLNLayer"]

    def __init__(self, config) -> None:
        super().__init__()
        self.causal_lm = CausalLM(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.causal_lm(input_ids, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.causal_lm.output_decoder(hidden_states)
