# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A training framework's model, with names and blocks of its own, as a test's subject.

Its layers are in a `ModuleDict`, in which PyTorch's pipeline stages may leave gaps. It
knows nothing of vLLM: it attends by PyTorch, and counts its own positions.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn


class Rotary(nn.Module):
    def __init__(self, head_dim, base):
        super().__init__()
        self.frequencies = 1 / base ** (torch.arange(0, head_dim, 2) / head_dim)

    def forward(self, x):  # [batch, heads, tokens, head_dim]
        angles = torch.arange(x.shape[-2])[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        a, b = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.query_linear = nn.Linear(config.hidden_size, width, bias=False)
        self.key_linear = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.value_linear = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.output_linear = nn.Linear(width, config.hidden_size, bias=False)
        self.rotary = Rotary(config.head_dim, 10_000.0)

    def forward(self, x):
        linears = (self.query_linear, self.key_linear, self.value_linear)
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in linears
        )
        q, k = self.rotary(q), self.rotary(k)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output_linear(out.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.feedforward_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feedforward = Feedforward(config)


class PreLNLayer(Layer):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feedforward(self.feedforward_norm(x))


class PostLNLayer(Layer):
    def forward(self, x):
        x = self.attention_norm(x + self.attention(x))
        return self.feedforward_norm(x + self.feedforward(x))


class DeepnetLayer(Layer):
    """As PostLNLayer, with a residual that is scaled by the number of layers."""

    def __init__(self, config):
        super().__init__(config)
        self.alpha = (2 * config.num_hidden_layers) ** 0.25

    def forward(self, x):
        x = self.attention_norm(self.alpha * x + self.attention(x))
        return self.feedforward_norm(self.alpha * x + self.feedforward(x))


LAYERS = {layer.__name__: layer for layer in (PreLNLayer, PostLNLayer, DeepnetLayer)}


class LayerStack(nn.Module):
    def __init__(self, config):
        super().__init__()
        kind = LAYERS[config.layer_kind]
        self.layers = nn.ModuleDict(
            {str(i): kind(config) for i in range(config.num_hidden_layers)}
        )
        self.layer_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return self.layer_norm(x)


class CausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_encoder = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer_stack = LayerStack(config)
        self.output_decoder = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False
        )

    def forward(self, input_ids):
        return self.output_decoder(self.layer_stack(self.input_encoder(input_ids)))


_LAYERS = "causal_lm.layer_stack.layers"


class FrameworkModel(nn.Module):
    """`[batch, tokens]` ids -> logits `[batch, tokens, vocab]`."""

    tp_plan = {
        f"{_LAYERS}.*.attention.query_linear": "colwise",
        f"{_LAYERS}.*.attention.key_linear": "colwise",
        f"{_LAYERS}.*.attention.value_linear": "colwise",
        f"{_LAYERS}.*.attention.output_linear": "rowwise",
        f"{_LAYERS}.*.feedforward.gate_proj": "colwise",
        f"{_LAYERS}.*.feedforward.up_proj": "colwise",
        f"{_LAYERS}.*.feedforward.down_proj": "rowwise",
    }
    pp_plan = {
        "causal_lm.input_encoder": (["input_ids"], ["hidden_states"]),
        _LAYERS: (["hidden_states"], ["hidden_states"]),
        "causal_lm.layer_stack.layer_norm": (["hidden_states"], ["hidden_states"]),
        "causal_lm.output_decoder": (["hidden_states"], ["logits"]),
    }
    _no_split_modules = list(LAYERS)

    def __init__(self, config):
        super().__init__()
        self.causal_lm = CausalLM(config)

    def forward(self, input_ids):
        return self.causal_lm(input_ids)


# What Llama's tensors are called in Hugging Face's checkpoints, and here.
NAMES = (
    ("model.embed_tokens", "causal_lm.input_encoder"),
    ("lm_head", "causal_lm.output_decoder"),
    ("model.norm", "causal_lm.layer_stack.layer_norm"),
    ("model.layers.{}.input_layernorm", _LAYERS + ".{}.attention_norm"),
    ("model.layers.{}.post_attention_layernorm", _LAYERS + ".{}.feedforward_norm"),
    ("model.layers.{}.self_attn.q_proj", _LAYERS + ".{}.attention.query_linear"),
    ("model.layers.{}.self_attn.k_proj", _LAYERS + ".{}.attention.key_linear"),
    ("model.layers.{}.self_attn.v_proj", _LAYERS + ".{}.attention.value_linear"),
    ("model.layers.{}.self_attn.o_proj", _LAYERS + ".{}.attention.output_linear"),
    ("model.layers.{}.mlp.gate_proj", _LAYERS + ".{}.feedforward.gate_proj"),
    ("model.layers.{}.mlp.up_proj", _LAYERS + ".{}.feedforward.up_proj"),
    ("model.layers.{}.mlp.down_proj", _LAYERS + ".{}.feedforward.down_proj"),
)


def from_hugging_face(state):
    return _renamed(state, NAMES)


def to_hugging_face(state):
    return _renamed(state, [(ours, theirs) for theirs, ours in NAMES])


def _renamed(state, names):
    """`state` with other names; each has to be known."""
    renamed = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        index = "".join(re.findall(r"\.(\d+)\.", path))
        (new,) = [new for old, new in names if old.format(index) == path]
        renamed[f"{new.format(index)}.{kind}"] = tensor
    return renamed
