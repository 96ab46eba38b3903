# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A module as people write it, with a table of its own and experts, to be varied."""

import torch
import torch.nn.functional as F
from cached_steps import VOCAB
from torch import nn

WIDTH, HEADS, LENGTH = 32, 2, 128


class Layer(nn.Module):
    """Rotary attention, of one head for keys and values that is repeated."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, rotation):
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).split((WIDTH, 16, 16), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in (q, k, v))
        q, k = self.turn(q, rotation), self.turn(k, rotation)
        k, v = (y.repeat_interleave(HEADS, dim=1) for y in (k, v))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(-2))

    def turn(self, x, rotation):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Experts(nn.Module):
    """Counts its experts with an arange of their own number, as often as it runs."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in zip(torch.arange(4), self.experts, strict=True):
            rows = chosen == index
            out[rows] = expert(x[rows])
        return x + out


class Model(nn.Module):
    layer = Layer
    times = 1

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([self.layer(), self.layer()])
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, VOCAB)
        angles = torch.outer(torch.arange(LENGTH), 0.1 ** torch.linspace(0, 1, 8))
        table = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in [*self.layers] * self.times:
            x = self.experts(layer(x, self.rotation(tokens.shape[1])))
        return {"logits": 5 * torch.tanh(self.head(x) / 5)}

    def rotation(self, length):
        return self.table[:length]


def with_attend(function, model=Model):
    """`model` with another attention call in its layers."""
    layer = type("Other", (Layer,), {"attend": lambda self, q, k, v: function(q, k, v)})
    return type("Other", (model,), {"layer": layer})()
