# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that a module writes out, in the ways in which people write it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cached_steps import assert_serves, look, served
from kernel_calls import KernelCalls
from plain_gpt import PlainConfig, PlainGPT, WrittenAttention
from rotary_model import Layer, Model, with_attend
from torch import nn

from vllm.model_executor.models.adapter import full_forward, use_vllm_attention
from vllm.model_executor.models.adapter.calls import UnservableError

BIAS = torch.ones(1, 1, 64, 64).tril()
Tensor = torch.Tensor


def later(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


def min_gpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.size(2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(BIAS[:, :, :tokens, :tokens] == 0, float("-inf"))
    att = F.dropout(F.softmax(att, dim=-1), 0.1, training=False)
    return att @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores /= torch.tensor(3.0)
    scores.masked_fill_(later(scores), -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), v)


def by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * 0.25).matmul(k.transpose(2, 3))
    scores[:, :, later(scores)] = torch.finfo(scores.dtype).min
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype).matmul(v)


def added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.5
    mask = torch.full(scores.shape[-2:], -1e4).triu(1)
    return torch.softmax(scores + mask, -1).type_as(v) @ v


def by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    hidden = torch.tensor(float("-inf"))
    return torch.where(later(scores), hidden, scores).softmax(-1) @ v


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [heads, tokens, head_dim]
    scores = torch.bmm(q, k.transpose(1, 2)).mul(0.25)
    scores = scores.masked_fill(later(scores), float("-inf"))
    return torch.bmm(scores.softmax(-1), v)[None]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q[:, None]  # [batch, groups, heads, tokens, head_dim]
    scores = q @ k[:, None, :1].transpose(-2, -1) * 0.25
    scores = scores.masked_fill(later(scores), float("-inf"))
    return (scores.softmax(-1) @ v[:, None, :1]).flatten(1, 2)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.25
    far = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-7)
    return scores.masked_fill(later(scores) | far, -1e10).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.25
    scores = 2.0 * torch.tanh(scores / 2.0)
    return scores.masked_fill(later(scores), float("-inf")).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    scores = scores.masked_fill(later(scores), float("-inf"))
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_with_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, tokens, heads, head_dim]
    scores = torch.einsum("bqhd,bkhd->bhqk", [q, k])
    scores = scores.masked_fill(later(scores), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", [scores, v]).transpose(1, 2)


FORMS = [min_gpt, in_place, by_index, added_mask, by_where, bmm, grouped, window]


@pytest.mark.parametrize("form", [*FORMS, capped, einsum, einsum_with_heads_last])
def test_what_people_write_is_served(form) -> None:
    first, second = assert_serves(with_attend(form)).attention.values()
    assert (first.heads, first.head_dim) == (2, 16)
    scales = {min_gpt: 0.25, in_place: 1 / 3, by_index: 1.0, added_mask: 0.5}
    assert first.scale == pytest.approx(scales.get(form, first.scale))
    assert first.window == (7 if form is window else None)
    assert first.soft_cap == (2.0 if form is capped else None)
    assert first.scores is not None and first.scores.path != second.scores.path


@torch.no_grad()
def test_in_a_step_there_are_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_attend(min_gpt)
    seen = assert_serves(model)
    ids = list(range(40))
    expected = full_forward(model, torch.tensor(ids), seen.form)
    # A step may have more tokens than the module's mask.
    monkeypatch.setitem(globals(), "BIAS", BIAS[:, :, :16, :16])
    with pytest.raises(RuntimeError, match="must match the size"):
        model(torch.tensor([ids]))
    found = served(model, seen, [ids])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def alibi(scores: Tensor) -> Tensor:
    place = torch.arange(scores.shape[-1])
    return scores + (place - place[:, None]) * 0.1


def of_each_head(scores: Tensor) -> Tensor:
    return scores * torch.tensor([0.2, 0.3]).view(1, 2, 1, 1)


def twice_capped(scores: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(scores))


def squared(scores: Tensor) -> Tensor:
    return scores**2


TEMPERATURE = nn.Parameter(torch.tensor(0.3))


def learned(scores: Tensor) -> Tensor:
    return scores * TEMPERATURE


@pytest.mark.parametrize(
    "change", [alibi, of_each_head, twice_capped, squared, learned]
)
def test_other_scores_are_refused(change) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = change(q @ k.transpose(-2, -1) * 0.25)
        return scores.masked_fill(later(scores), float("-inf")).softmax(-1) @ v

    with pytest.raises(UnservableError, match="attention is written out at .*, and"):
        look(with_attend(attend))


def over_queries(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-2) @ v


def pruned(scores: Tensor, v: Tensor) -> Tensor:
    weights = scores.softmax(-1)
    return weights.masked_fill(weights < 0.1, 0.0) @ v


def renormed(scores: Tensor, v: Tensor) -> Tensor:
    return (scores.softmax(-1) * 2) @ v


def transposed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1).transpose(-2, -1) @ v


def summed(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...qk,...kd->...qd", scores.softmax(-1), v)


def halves(scores: Tensor, v: Tensor) -> Tensor:
    first, second = scores.softmax(-1).chunk(2, 1)
    return torch.cat([first, second], 1) @ v


@pytest.mark.parametrize(
    "use", [over_queries, pruned, renormed, transposed, summed, halves]
)
def test_other_uses_of_weights_are_refused(use) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * 0.25
        return use(scores.masked_fill(later(scores), float("-inf")), v)

    with pytest.raises(UnservableError, match="attention is written out at .*, and"):
        look(with_attend(attend))


def test_bidirectional_attention_is_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    with pytest.raises(UnservableError, match="shows later tokens to earlier ones"):
        look(with_attend(attend))


class Product(nn.Module):
    """A product that is no attention's, beside attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.table = nn.Parameter(torch.randn(256, 256) / 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner(tokens)
        return torch.matmul(x["logits"] if isinstance(x, dict) else x, self.table)


def test_other_products_are_left_alone() -> None:
    seen = assert_serves(Product(with_attend(min_gpt)))
    assert len(seen.scores) == 2


@pytest.mark.parametrize("form", [*FORMS, capped, einsum, einsum_with_heads_last])
def test_a_trainer_attends_by_vllms_kernel(form) -> None:
    """Of two sequences, with the gradients of the module's own code."""
    torch.manual_seed(0)
    module = with_attend(form)
    routed = use_vllm_attention(copy.deepcopy(module))
    ids = torch.randint(256, (1 if form is bmm else 2, 20))
    found = []
    for one in (module, routed):
        with KernelCalls() as calls:
            logits = one(ids)["logits"]
        logits.square().sum().backward()
        gradients = [p.grad for p in one.parameters() if p.grad is not None]
        found.append((calls.forwards, logits, gradients))
    (before, logits, gradients), (kernels, *ours) = found
    # That kernel has no soft caps.
    assert (before, kernels) == (0, 0 if form is capped else 2)
    torch.testing.assert_close(ours, [logits, gradients], rtol=1e-4, atol=1e-4)


def test_a_compiled_trainer_has_a_break_there() -> None:
    module = PlainGPT(PlainConfig(), WrittenAttention)
    routed = use_vllm_attention(copy.deepcopy(module))
    ids = torch.randint(256, (2, 20))
    found, _ = torch.compile(routed, backend="eager")(ids, ids)
    torch.testing.assert_close(found, module(ids, ids)[0], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="follows written-out attention"):
        torch.compile(routed, backend="eager", fullgraph=True)(ids, ids)


def test_a_trainers_mask_may_hide_padding() -> None:
    hidden = torch.zeros(2, 1, 1, 20, dtype=torch.bool)
    hidden[1, ..., :5] = True  # of the second sequence, the first five

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * 0.25
        scores = scores.masked_fill(later(scores), float("-inf"))
        if len(q) > 1:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v

    module = with_attend(attend)
    routed = use_vllm_attention(copy.deepcopy(module))
    ids = torch.randint(256, (2, 20))
    ours, expected = routed(ids)["logits"], module(ids)["logits"]
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1, 5:], expected[1, 5:], rtol=1e-4, atol=1e-4)


class Drops(Layer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores = scores.masked_fill(later(scores), float("-inf"))
        return F.dropout(scores.softmax(-1), 0.5, self.training) @ v


def test_a_trainers_dropout_is_the_kernels() -> None:
    module = use_vllm_attention(type("Dropping", (Model,), {"layer": Drops})())
    ids = torch.randint(256, (1, 20))
    first, second = (module(ids)["logits"] for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    first, second = (module(ids)["logits"] for _ in range(2))
    assert torch.equal(first, second)


class Multiplies(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Product(nn.Identity())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return min_gpt(q, k, v) + 0 * self.inner(v.new_ones(256))[0]


def test_products_of_other_submodules_within_are_an_error() -> None:
    module = type("Multiplying", (Model,), {"layer": Multiplies})()
    assert_serves(module)
    with pytest.raises(UnservableError, match=r"with others .*\(layers.0.inner\)"):
        use_vllm_attention(module)
