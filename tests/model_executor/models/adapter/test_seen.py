# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules as people write them, and what is seen of them in a trial."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from cached_steps import SHAPE, TOKENS, VOCAB, assert_serves, look
from plain_gpt import PlainConfig, PlainGPT
from rotary_model import Model, with_attend
from torch import nn

from vllm.model_executor.models.adapter import Adapter
from vllm.model_executor.models.adapter.call_forms import CannotBeCalledError
from vllm.model_executor.models.adapter.transformers_attention import (
    leaves_out_caps,
    use_seen_attention,
)
from vllm.model_executor.models.adapter.trial import UnservableError


class Looped(Model):
    times = 2


class CountsTwice(Model):
    """Makes its rotation of an arange, and a mask of another that matters not."""

    def rotation(self, length):
        self.mask = torch.arange(length)[:, None] >= torch.arange(length)
        angles = (1.0 + torch.arange(length).float())[:, None] * torch.ones(8) / 10
        return torch.polar(torch.ones_like(angles), angles)


class WritesIntoRoom(Model):
    """What its room holds at first differs from token to token, and is not read."""

    def forward(self, tokens):
        ids = torch.empty(tokens.shape, dtype=torch.float64)
        ids[:] = tokens
        return super().forward(ids.long())


@pytest.fixture
def no_empty_memory_is_equal():
    """`torch.empty` is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_room_that_is_written_says_nothing(no_empty_memory_is_equal):
    assert_serves(WritesIntoRoom())


def window(q, k, v):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-6)
    return F.scaled_dot_product_attention(q, k, v, seen, scale=0.3)


def additive(q, k, v):
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
    return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize(
    "build, calls",
    [
        (lambda: PlainGPT(PlainConfig(vocab_size=VOCAB)), 2),
        (Model, 2),
        (Looped, 4),
        (CountsTwice, 2),
        (lambda: with_attend(window), 2),
        (lambda: with_attend(additive, Looped), 4),
    ],
    ids=["positions-and-last-only", "table", "looped", "arange", "window", "additive"],
)
def test_plain_modules(build, calls):
    seen = assert_serves(build())
    assert len(seen.attention) == calls
    assert seen.head is not None
    assert len(seen.origins) > 0


class TakesPlaces(Model):
    """As lingua: places of its tokens, the same ones for each sequence."""

    def forward(self, tokens, tok_idx=None):
        self.places = tok_idx
        return super().forward(tokens)

    def rotation(self, length):
        places = self.places
        table = self.table if places is None else self.table[places]
        assert table.dim() == 2
        return table[0:length]


def test_places_without_a_batch_axis():
    seen = assert_serves(TakesPlaces())
    assert seen.form.positions == "tok_idx" and seen.form.flat_positions
    assert not seen.origins


def test_what_a_call_asks_for():
    (first, second) = look(with_attend(window)).attention.values()
    assert first == second
    assert (first.heads, first.kv_heads, first.repeats) == (2, 1, 2)
    assert (first.window, first.scale, first.head_dim) == (7, 0.3, 16)


@pytest.mark.parametrize(
    "cls, config, extra",
    [
        ("LlamaForCausalLM", "LlamaConfig", {}),
        ("Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": 8}),
        ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4}),
    ],
)
def test_transformers(cls, config, extra):
    config = getattr(transformers, config)(**SHAPE, **TOKENS, **extra)
    config._attn_implementation = "eager"
    model = getattr(transformers, cls)(config)
    seen = assert_serves(model)
    assert len(seen.attention) == 2
    assert config._attn_implementation == "eager"  # a trainer's module may share it


# ---- Refusals ----------------------------------------------------------------------


def alibi(q, k, v):
    place = torch.arange(q.shape[2])
    bias = -(place[:, None] - place).abs() * 0.1
    hidden = torch.full(bias.shape, float("-inf")).triu(1)
    return F.scaled_dot_product_attention(q, k, v, bias + hidden)


def prefix(q, k, v):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    seen[:, :4] = True
    return F.scaled_dot_product_attention(q, k, v, seen)


def chunks(q, k, v):
    chunk = torch.arange(q.shape[2]) // 8
    seen = (chunk[:, None] == chunk) & torch.ones(len(chunk), len(chunk)).tril().bool()
    return F.scaled_dot_product_attention(q, k, v, seen)


def pooled(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :, :-2], v[:, :, :-2])


@pytest.mark.parametrize(
    "function, message",
    [
        (alibi, "in 'layers.0' cannot be served: it adds a bias"),
        (prefix, "shows later tokens to earlier ones"),
        (chunks, "neither causal nor a sliding window"),
        (F.scaled_dot_product_attention, "every token sees all tokens"),
        (pooled, "attends from 59 queries to 57 keys"),
    ],
)
def test_attention_that_is_refused(function, message):
    with pytest.raises(UnservableError, match=message):
        look(with_attend(function))


class Shifts(Model):
    """Mixes each token with the one before."""

    def rotation(self, length):
        return self.table[:length]

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + F.pad(x, (0, 0, 1, -1))
        return self.head(self.layers[0](x, self.rotation(tokens.shape[1])))


class Sums(Shifts):
    """A running mean of tokens, without attention."""

    def forward(self, tokens):
        return self.head(self.embedding(tokens).cumsum(1))


class CountsBackwards(Model):
    def rotation(self, length):
        return self.table[:length].flip(0)


class Sawtooth(Model):
    def rotation(self, length):
        return self.table[torch.linspace(0, length - 1, length).long()]


@pytest.mark.parametrize(
    "build, message",
    [
        (Shifts, "tokens depend on other tokens outside attention"),
        (Sums, "tokens depend on other tokens outside attention"),
        (CountsBackwards, "outside attention"),
        (Sawtooth, r"by .*test_seen.py:\d+: return self.table\[torch.linspace"),
    ],
)
def test_tokens_are_apart(build, message):
    with pytest.raises(UnservableError, match=message):
        look(build())


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, batch, lengths):
        assert batch.shape[0] == len(lengths)
        return self.model(batch)


def test_what_cannot_be_called_says_how_it_was():
    with pytest.raises(CannotBeCalledError) as error:
        look(Unknown())
    message = str(error.value)
    assert "Unknown.forward(batch, lengths) could not be called" in message
    assert "forward(ids [1, tokens]): TypeError" in message
    assert "adapter=Adapter(forward=function)" in message


def call_unknown(module, ids, positions):
    return module(ids, torch.tensor([ids.shape[1]]))


def test_an_adapter_says_how():
    assert_serves(Unknown(), Adapter(forward=call_unknown))


@pytest.mark.parametrize(("implementation", "left_out"), [("sdpa", 1), ("eager", 0)])
def test_transformers_sdpa_leaves_out_caps(implementation, left_out):
    """The module's own attention is asked, and not the one that shows its calls."""
    config = transformers.Gemma2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        )
    assert not leaves_out_caps(model)
    use_seen_attention(model)
    assert leaves_out_caps(model) == left_out
