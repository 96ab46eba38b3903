# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention functions that no mode sees, called in the ways that people call them."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from cached_steps import VOCAB, assert_serves, look
from ranks import run_ranks
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vllm.model_executor.models.adapter import use_vllm_attention
from vllm.model_executor.models.adapter.calls import UnservableError

WIDTH, HEADS, SIZE, WINDOW, CAP = 64, 2, 32, 7, 3.0


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Another kernel with flash-attn's arguments, which cannot be installed here."""
    raise RuntimeError("needs a GPU")


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *args, **kwargs):
    raise RuntimeError("needs a GPU")


def flash_attn_qkvpacked_func(qkv, *args, **kwargs):
    raise RuntimeError("needs a GPU")


library = types.ModuleType("flash_attn")
library.flash_attn_func = flash_attn_func
library.flash_attn_varlen_func = flash_attn_varlen_func
library.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
compiled_flex = torch.compile(flex_attention, backend="eager")


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", library)


def causal(batch, head, query, key):
    return query >= key


def near(batch, head, query, key):
    return (query >= key) & (query - key < WINDOW)


def cap(score, batch, head, query, key):
    return CAP * torch.tanh(score / CAP)


def bias(score, batch, head, query, key):
    return score + 0.1 * (key - query)


def block_mask(q, seen):
    return create_block_mask(seen, None, None, q.shape[2], q.shape[2], device="cpu")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).split((WIDTH, SIZE, SIZE), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, SIZE)).transpose(1, 2) for y in (q, k, v))
        return x + self.attend(q, k, v).transpose(1, 2).flatten(-2)

    def attend(self, q, k, v):  # [batch, heads, tokens, head_dim]
        raise NotImplementedError


class Flex(Attention):
    def attend(self, q, k, v):
        return flex_attention(q, k, v, block_mask=block_mask(q, near), enable_gqa=True)


class ByModule(Attention):
    def attend(self, q, k, v):
        mask = block_mask(q, causal)
        return flex.flex_attention(q, k, v, cap, block_mask=mask, enable_gqa=True)


def in_a_helper(q, k, v, mask):
    return compiled_flex(q, k, v, block_mask=mask, scale=0.2, enable_gqa=True)


class ByHelper(Attention):
    @torch.no_grad()  # a wrapper around the method
    def attend(self, q, k, v):
        return in_a_helper(q, k, v, block_mask(q, causal))


class ByAttribute(Attention):
    def __init__(self):
        super().__init__()
        self.function = flex_attention

    def attend(self, q, k, v):
        mask = block_mask(q, near)
        return self.function(q, k, v, block_mask=mask, enable_gqa=True)


class Flash(Attention):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = (WINDOW - 1, 0)
        out = flash_attn_func(q, k, v, causal=True, window_size=window, softcap=CAP)
        return out.transpose(1, 2)


class FlashVarlen(Attention):
    def attend(self, q, k, v):
        ends = torch.tensor([0, q.shape[2]], dtype=torch.int32)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        tokens = len(q)
        out = library.flash_attn_varlen_func(
            q, k, v, ends, ends, tokens, tokens, softmax_scale=0.3, causal=True
        )
        return out.transpose(0, 1)[None]


class Varlen(Attention):
    def attend(self, q, k, v):
        ends = torch.tensor([0, q.shape[2]], dtype=torch.int32)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        tokens = len(q)
        out = varlen_attn(
            q, k, v, ends, ends, tokens, tokens, window_size=(-1, 0), enable_gqa=True
        )
        return out.transpose(0, 1)[None]


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(layer() for layer in layers)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


KINDS = [Flex, ByModule, ByHelper, ByAttribute, Flash, FlashVarlen, Varlen]


def test_calls_that_no_mode_sees_are_served():
    model = Model(*KINDS)
    methods = {kind: kind.attend for kind in KINDS}
    seen = assert_serves(model)
    paths = {site.path for site in seen.attention}
    assert paths == {f"layers.{i}" for i in range(len(KINDS))}
    calls = list(seen.attention.values())
    assert [call.window for call in calls] == [7, None, None, 7, 7, None, None]
    caps = [CAP if call.soft_cap else None for call in calls]
    assert caps == [None, CAP, None, None, CAP, None, None]
    assert {call.kv_heads for call in calls} == {1}
    assert calls[2].scale == 0.2 and calls[5].scale == 0.3
    # Neither the classes nor what their code names has changed.
    assert all(kind.attend is methods[kind] for kind in KINDS)
    assert Flex.attend.__globals__["flex_attention"] is flex.flex_attention
    assert all(map(isinstance, model.layers, KINDS))


def test_they_train_by_vllms_kernels():
    torch.manual_seed(0)
    model = Model(*KINDS)
    routed = use_vllm_attention(copy.deepcopy(model), vocab_size=VOCAB)
    ids = torch.randint(VOCAB, (1, 20))
    look(model)  # on a CPU, those without a kernel run by plain operators
    with torch.no_grad():
        torch.testing.assert_close(routed(ids), model(ids), rtol=1e-4, atol=1e-4)
    routed(ids).square().mean().backward()  # PyTorch's flex has none on a CPU
    assert routed.layers[0].qkv.weight.grad[:WIDTH].abs().sum() > 0  # of queries


def test_gradients_of_packed_calls():
    torch.manual_seed(0)
    model = Model(Flash, FlashVarlen, Varlen)
    routed = use_vllm_attention(copy.deepcopy(model), vocab_size=VOCAB)
    look(model)
    ids = torch.randint(VOCAB, (1, 20))
    found, expected = (
        torch.autograd.grad(m(ids).square().mean(), list(m.parameters()))
        for m in (routed, model)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def documents_of(kind, x):
    """A row of two documents, each attended to apart."""
    return torch.cat([kind(x[:, :5]), kind(x[:, 5:])], dim=1)


class TwoDocuments(Varlen):
    ends = (0,)

    def attend(self, q, k, v):
        ends = torch.tensor([*self.ends, q.shape[2]], dtype=torch.int32)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        longest = int(ends.diff().amax())
        out = varlen_attn(
            q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True
        )
        return out.transpose(0, 1)[None]


def test_packed_documents_in_training():
    torch.manual_seed(0)
    routed = use_vllm_attention(Model(TwoDocuments), vocab_size=VOCAB)
    ids = torch.randint(VOCAB, (1, 20))
    apart = documents_of(routed, ids)
    routed.layers[0].ends = (0, 5)
    torch.testing.assert_close(routed(ids), apart, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnservableError, match=r"within the documents \[0, 5, "):
        look(routed)


class Biased(Attention):
    def attend(self, q, k, v):
        mask = block_mask(q, causal)
        return flex_attention(q, k, v, bias, block_mask=mask, enable_gqa=True)


class WithSums(Attention):
    def attend(self, q, k, v):
        request = flex.AuxRequest(lse=True)
        mask = block_mask(q, causal)
        out, _ = flex_attention(
            q, k, v, block_mask=mask, enable_gqa=True, return_aux=request
        )
        return out


class Everything(Attention):
    def attend(self, q, k, v):
        return flex_attention(q, k, v, enable_gqa=True)


class Slopes(Attention):
    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        slopes = torch.ones(HEADS)
        return flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)


class Packed(Attention):
    def attend(self, q, k, v):
        qkv = torch.stack([q, q, q], dim=2)
        return flash_attn_qkvpacked_func(qkv, causal=True)


class OfAnotherClass(Attention):
    def attend(self, q, k, v):
        return Holder.function(q, k, v, block_mask=block_mask(q, causal))


class Holder:
    function = staticmethod(flex_attention)


def see_megatron(context):
    """Megatron's own attention is one call; its groups are those of vLLM."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    config = TransformerConfig(
        num_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=1,
        window_size=(WINDOW - 1, 0),
        window_attn_skip_freq=2,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
    )
    groups = context.megatron_groups()
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, VOCAB, 64, pg_collection=groups).eval()
    seen = assert_serves(model)
    assert [call.window for call in seen.attention.values()] == [WINDOW, None]
    assert {call.kv_heads for call in seen.attention.values()} == {1}
    layer = model.decoder.layers[0].self_attention
    assert type(layer.core_attention) is not DotProductAttention
    assert isinstance(layer.core_attention, DotProductAttention)
    ids = torch.arange(20)[None]
    expected = model(ids, ids, None)
    routed = use_vllm_attention(model, vocab_size=VOCAB)
    torch.testing.assert_close(routed(ids, ids, None), expected, rtol=1e-4, atol=1e-4)


def test_megatrons_own_attention(tmp_path):
    pytest.importorskip("megatron.core")
    run_ranks(see_megatron, tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Biased, "its score_mod adds a bias"),
        (WithSums, "the softmax's sums"),
        (Everything, "every token sees all tokens"),
        (Slopes, "it gives alibi_slopes"),
        (Packed, "flash_attn.flash_attn_qkvpacked_func attends inside"),
        (OfAnotherClass, "flex_attention.flex_attention attends inside"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(kind, message):
    with pytest.raises(UnservableError, match=message):
        look(Model(kind))
