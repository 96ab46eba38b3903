# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TrainableAttention outside an engine step, and how it is built inside an engine.

What an engine computes with it is tested where the engines are.
"""

import copy
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_definition import attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.trainable_attention import (
    TrainableAttention,
    TrainableFlashAttention,
    packed_sequences,
)
from vllm.model_executor.layers.trainable_attention.engine_step import (
    AttentionCalls,
    EngineStep,
    current_step,
)
from vllm.model_executor.layers.trainable_attention.kv_caches import (
    a_kv_cache_for_each_call,
)
from vllm.v1.attention.training import blockwise

LENGTHS = (5, 0, 1, 70, 0, 33)
NAMES_OF_RESULTS = ("out", "dq", "dk", "dv")
FACTOR = 2.5  # dQ of PyTorch's fused kernel on a CPU comes to 2.04


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def cu(lengths: tuple[int, ...]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))


def qkv(
    tokens: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(tokens, n, head_dim, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )


def output_and_grads(
    out: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> list[torch.Tensor]:
    grads = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return [x.detach().double() for x in (out, *grads)]


def assert_as_exact_as_reference(
    layer: TrainableAttention,
    inputs: tuple[torch.Tensor, ...],
    lengths: tuple[int, ...],
    out: torch.Tensor,
) -> None:
    """Errors are those of the definition in the same dtype, to a small factor."""
    dtype = inputs[0].dtype
    grad = torch.randn(out.shape).to(dtype)

    def evaluate(dtype: torch.dtype) -> list[torch.Tensor]:
        cast = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
        return output_and_grads(
            attention(layer, *cast, layer.sinks, lengths), cast, grad
        )

    exact = evaluate(torch.float64)
    # float64's own errors are taken to be float32's, in its finer roundings
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    plain = evaluate(plain_dtype)
    eps, plain_eps = torch.finfo(dtype).eps, torch.finfo(plain_dtype).eps
    ours = output_and_grads(out, inputs, grad)
    for name, x, p, e in zip(NAMES_OF_RESULTS, ours, plain, exact, strict=True):
        # a gradient that is 0 by definition, as of a lone key, is rounding alone
        unit = max(e.norm().item(), grad.double().norm().item())
        error = (x - e).norm().item() / unit / eps
        plain_error = (p - e).norm().item() / unit / plain_eps
        assert error <= FACTOR * max(plain_error, 1), (name, error, plain_error)


# ------------------------------------------------------------------ against float64


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_head_shapes(head_dim: int, kv_heads: int, causal: bool) -> None:
    layer = TrainableAttention(4, head_dim, kv_heads, causal=causal)
    inputs = qkv(sum(LENGTHS), 4, kv_heads, head_dim)
    out = layer(*inputs, cu_seqlens=cu(LENGTHS))
    assert_as_exact_as_reference(layer, inputs, LENGTHS, out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"sliding_window": 1},
        {"sliding_window": 7},
        {"sliding_window": 10_000},
        {"logits_soft_cap": 2.0},
        {"sliding_window": 16, "logits_soft_cap": 2.0, "scale": 0.5},
        {"sinks": True},
        {"sinks": True, "sliding_window": 7, "logits_soft_cap": 2.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], causal: bool, dtype: torch.dtype) -> None:
    layer = TrainableAttention(4, 32, 2, causal=causal, **options)
    for sinks in layer.parameters():
        torch.nn.init.normal_(sinks)
    inputs = qkv(sum(LENGTHS), dtype=dtype)
    out = layer(*inputs, cu_seqlens=cu(LENGTHS))
    assert out.dtype == dtype
    assert_as_exact_as_reference(layer, inputs, LENGTHS, out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{"logits_soft_cap": 2.0}, {"sliding_window": 90}])
def test_sequences_of_many_blocks(
    options: dict[str, Any], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_BLOCK_ROWS", 48)
    lengths = (300, 97)
    layer = TrainableAttention(4, 32, 2, causal=causal, **options)
    inputs = qkv(sum(lengths))
    out = layer(*inputs, cu_seqlens=cu(lengths))
    assert_as_exact_as_reference(layer, inputs, lengths, out)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"sliding_window": 2}, {"logits_soft_cap": 1.0}]
)
def test_gradcheck(options: dict[str, Any]) -> None:
    layer = TrainableAttention(2, 4, 1, **options)
    inputs = qkv(7, 2, 1, 4, torch.float64)
    offsets = cu((4, 0, 1, 2))
    assert torch.autograd.gradcheck(lambda *x: layer(*x, offsets), inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_sinks(dropout: float) -> None:
    layer = TrainableAttention(2, 4, 1, sinks=True, dropout=dropout).double()
    inputs = qkv(7, 2, 1, 4, torch.float64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(sinks: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(
            layer, {"sinks": sinks}, (*inputs, cu((4, 0, 1, 2)))
        )

    assert torch.autograd.gradcheck(call, (sinks, *inputs))


def test_gradcheck_with_dropout() -> None:
    layer = TrainableAttention(2, 4, 1, dropout=0.4)

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return layer(*inputs)

    assert torch.autograd.gradcheck(seeded, qkv(5, 2, 1, 4, torch.float64))


def test_gradcheck_of_hidden_states_and_weights() -> None:
    layer = TrainableFlashAttention(8, 2, 1, rope_theta=100.0, bias=True).double()
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, named, (hidden,))

    assert torch.autograd.gradcheck(call, (hidden, *layer.parameters()))


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 3}])
def test_packed_is_per_sequence_is_padded(options: dict[str, Any]) -> None:
    layer = TrainableAttention(4, 32, 2, **options)
    q, k, v = qkv(sum(LENGTHS), dtype=torch.float64)
    packed = layer(q, k, v, cu_seqlens=cu(LENGTHS))
    sequences = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    alone = [layer(*sequence) for sequence in sequences]
    torch.testing.assert_close(packed, torch.cat(alone))

    longest = max(LENGTHS)
    right = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    for mask in (right, right.flip(1)):  # padded on the right, on the left
        rows = tuple(
            torch.full((len(LENGTHS), longest, *x.shape[1:]), torch.nan).double()
            for x in (q, k, v)
        )
        for row, x in zip(rows, (q, k, v), strict=True):
            row[mask] = x.detach()
            row.requires_grad_()
        padded = layer(*rows, attention_mask=mask.long())
        assert torch.equal(padded, layer(*rows, attention_mask=mask))
        torch.testing.assert_close(padded[mask], packed)
        assert (padded[~mask] == 0).all()
        grad = torch.randn_like(padded)
        padded_grads = torch.autograd.grad(padded, rows, grad)
        grads = torch.autograd.grad(packed, (q, k, v), grad[mask], retain_graph=True)
        for padded_grad, packed_grad in zip(padded_grads, grads, strict=True):
            torch.testing.assert_close(padded_grad[mask], packed_grad)
            assert (padded_grad[~mask] == 0).all()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}])
def test_rows_are_sequences(options: dict[str, Any]) -> None:
    layer = TrainableAttention(4, 32, 2, **options)
    flat = qkv(3 * 10, dtype=torch.float64)
    rows = tuple(x.unflatten(0, (3, 10)) for x in flat)
    expected = layer(*flat, cu_seqlens=cu((10, 10, 10)))
    out = layer(*rows)
    assert out.shape == rows[0].shape
    torch.testing.assert_close(out.flatten(0, 1), expected)
    # a batch of one row may be packed
    one_row = layer(*(x[None] for x in flat), cu_seqlens=cu((10, 10, 10)))
    torch.testing.assert_close(one_row[0], expected)


def test_merged_heads_give_merged_heads() -> None:
    layer = TrainableAttention(4, 32, 2)
    inputs = qkv(12)
    expected = layer(*inputs)
    merged = tuple(x.flatten(1) for x in inputs)
    assert torch.equal(layer(*merged), expected.flatten(1))
    rows = layer(*(x.unflatten(0, (2, 6)) for x in merged))
    assert rows.shape == (2, 6, 4 * 32)
    # with one KV head and rows of one token, a key could pass for [tokens, 1, d]
    one_kv = TrainableAttention(4, 32, 1)
    q, k, v = torch.randn(3, 1, 128), torch.randn(3, 1, 32), torch.randn(3, 1, 32)
    assert torch.equal(one_kv(q, k, v), v.repeat(1, 1, 4))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}])
def test_strided_inputs(options: dict[str, Any]) -> None:
    layer = TrainableAttention(4, 32, 2, **options)
    fused = torch.randn(9, 8 * 32, dtype=torch.float64)
    q, k, v = fused.split((128, 64, 64), dim=-1)
    expected = layer(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(layer(q, k, v), expected)
    by_head = tuple(
        x.unflatten(1, (-1, 32)).transpose(0, 1).contiguous().transpose(0, 1)
        for x in (q, k, v)
    )
    assert torch.equal(layer(*by_head).flatten(1), expected)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"dropout": 0.5}])
def test_empty_inputs(options: dict[str, Any]) -> None:
    layer = TrainableAttention(4, 32, 2, **options)
    for lengths in ((), (0,), (0, 0)):
        inputs = qkv(0)
        out = layer(*inputs, cu_seqlens=cu(lengths))
        assert out.shape == (0, 4, 32)
        out.sum().backward()
        assert all(x.grad is not None for x in inputs)
    for shape in ((0, 5), (5, 0)):
        out = layer(*(x.view(*shape, x.shape[1], 32) for x in qkv(0)))
        assert out.shape == (*shape, 4, 32)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    out = layer(*(x.unflatten(0, (2, 3)) for x in qkv(6)), attention_mask=mask)
    assert (out == 0).all()


def test_inputs_are_not_written() -> None:
    layer = TrainableAttention(4, 32, 2, sliding_window=3, dropout=0.1)
    inputs = qkv(9)
    before = [x.detach().clone() for x in inputs]
    layer(*inputs).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def largest_allocation(layer: TrainableAttention, tokens: int) -> int:
    """Bytes that the largest operator of a forward and backward leaves allocated."""
    inputs = qkv(tokens, layer.num_heads, layer.num_kv_heads)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(*inputs).sum().backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_keys_are_not_expanded_and_scores_not_kept() -> None:
    tokens, heads, head_dim = 2048, 16, 32
    layer = TrainableAttention(heads, head_dim, 1)
    query_bytes = tokens * heads * head_dim * 4
    assert largest_allocation(layer, tokens) <= query_bytes
    # by blocks: as much as the block's bound, whatever the length
    bound = 4 * blockwise._MAX_BLOCK_SCORES
    for tokens in (1024, 2048):
        capped = TrainableAttention(heads, head_dim, 1, logits_soft_cap=9.0)
        assert largest_allocation(capped, tokens) <= bound


# --------------------------------------------------------------------------- dropout


def test_dropout_statistics() -> None:
    dropout, tokens = 0.25, 400
    layer = TrainableAttention(2, 32, 1, dropout=dropout, causal=False)
    # equal scores and values of 1: an output is the share of kept keys over 1 - p
    q, k = torch.zeros(tokens, 2, 32), torch.zeros(tokens, 1, 32)
    share = layer(q, k, torch.ones_like(k))[..., 0]
    deviation = (dropout / (1 - dropout) / tokens) ** 0.5  # of one output
    assert abs(share.mean() - 1) < 5 * deviation / share.numel() ** 0.5
    assert share.std() == pytest.approx(deviation, rel=0.2)
    assert not torch.equal(share[:, 0], share[:, 1])  # heads differ


def test_dropout_follows_the_seed_and_is_off_in_eval() -> None:
    layer = TrainableAttention(4, 32, 2, dropout=0.5)
    inputs = qkv(50)

    def call(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(*inputs)

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    torch.manual_seed(1)
    assert not torch.equal(layer(*inputs), layer(*inputs))
    plain = TrainableAttention(4, 32, 2)
    layer.eval()
    assert torch.equal(call(1), plain(*inputs))
    assert torch.equal(call(1), call(2))


# ------------------------------------------------------------------ packed_sequences


class TwoLayers(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            TrainableFlashAttention(64, 4, 2, rope_theta=1e4, **options)
            for _ in range(2)
        )
        self.checkpointed: bool | None = None  # use_reentrant, if any

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.checkpointed is None:
                hidden = hidden + layer(hidden)
            else:
                hidden = hidden + checkpoint(
                    layer, hidden, use_reentrant=self.checkpointed
                )
        return hidden


def weight_grads(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


def test_a_whole_model_trains_on_packed_batches() -> None:
    model = TwoLayers().double()
    hidden = torch.randn(sum(LENGTHS), 64, dtype=torch.float64)
    alone = torch.cat([model(x) for x in hidden.split(LENGTHS)])
    expected = weight_grads(model, alone.square().sum())
    with packed_sequences(cu(LENGTHS)):
        packed = model(hidden)
        one_row = model(hidden[None])
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(one_row[0], alone)
    torch.testing.assert_close(weight_grads(model, packed.square().sum()), expected)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda x: np.array(x, dtype=np.int32)]
)
def test_cu_seqlens_may_be_a_list_or_an_array(kind: Any) -> None:
    offsets = cu((2, 4))
    given = kind(offsets.tolist())
    layer = TrainableAttention(4, 32, 2)
    inputs = qkv(6)
    expected = layer(*inputs, cu_seqlens=offsets)
    assert torch.equal(layer(*inputs, cu_seqlens=given), expected)
    with packed_sequences(given):
        assert torch.equal(layer(*inputs), expected)
    rotated = TrainableFlashAttention(64, 4, 2, rope_theta=1e2)
    hidden = torch.randn(6, 64)
    assert torch.equal(
        rotated(hidden, cu_seqlens=given), rotated(hidden, cu_seqlens=offsets)
    )


def test_packed_sequences_nest_and_end() -> None:
    layer = TrainableAttention(4, 32, 2)
    inputs = qkv(6)
    whole, halves = layer(*inputs), layer(*inputs, cu_seqlens=cu((3, 3)))
    with packed_sequences(cu((3, 3))):
        assert torch.equal(layer(*inputs), halves)
        with packed_sequences(cu((6,))):
            assert torch.equal(layer(*inputs), whole)
        assert torch.equal(layer(*inputs), halves)
        assert torch.equal(layer(*inputs, cu_seqlens=cu((6,))), whole)
    with pytest.raises(KeyError), packed_sequences(cu((3, 3))):
        raise KeyError
    assert torch.equal(layer(*inputs), whole)


def test_packed_sequences_are_of_one_thread() -> None:
    layer = TrainableAttention(4, 32, 2)
    inputs = qkv(6)
    whole = layer(*inputs)
    seen = []
    with packed_sequences(cu((3, 3))):
        thread = threading.Thread(target=lambda: seen.append(layer(*inputs)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], whole)


def test_packed_sequences_reach_the_threads_of_backward() -> None:
    # On a GPU every backward runs in such a thread, here a deeply nested one does.
    layer = TrainableAttention(4, 32, 2)
    inputs = qkv(6)
    halves = layer(*inputs, cu_seqlens=cu((3, 3)))
    seen = {}

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            if ctx.depth > 0:
                with torch.enable_grad():
                    x = torch.ones((), requires_grad=True)
                    Nested.apply(x, ctx.depth - 1).backward()
            else:
                seen[threading.get_ident()] = layer(*inputs)
            return grad, None

    with packed_sequences(cu((3, 3))):
        Nested.apply(torch.ones((), requires_grad=True), 100).backward()
    assert list(seen) != [threading.get_ident()]
    assert torch.equal(*seen.values(), halves)


# ------------------------------------------------------- checkpointing, compile, amp


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"sliding_window": 3}])
def test_checkpointing(options: dict[str, Any], use_reentrant: bool) -> None:
    model = TwoLayers(**options)
    hidden = torch.randn(sum(LENGTHS), 64, requires_grad=True)
    grads = []
    for checkpointed in (None, use_reentrant):
        model.checkpointed = checkpointed
        torch.manual_seed(1)
        with packed_sequences(cu(LENGTHS)):
            grads.append(weight_grads(model, model(hidden).square().sum()))
    # reentrant checkpointing sums gradients in another order
    exact = {} if use_reentrant else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(grads[1], grads[0], **exact)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 2.0}])
def test_recomputation_that_lost_its_sequences_is_an_error(
    options: dict[str, Any], use_reentrant: bool
) -> None:
    model = TwoLayers(**options)
    model.checkpointed = use_reentrant
    hidden = torch.randn(sum(LENGTHS), 64, requires_grad=True)
    before = model(hidden).sum()
    with packed_sequences(cu(LENGTHS)):
        loss = model(hidden).sum()
    after = model(hidden).sum()
    with pytest.raises(RuntimeError, match=r"Call backward\(\) inside the `with`"):
        loss.backward()
    # forwards without packs are not concerned, whatever is before them or between
    grads = [weight_grads(model, x) for x in (before, after)]
    torch.testing.assert_close(grads[0], grads[1])
    model(torch.randn(2, 5, 64, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_step_without_packs_may_be_checkpointed_beside_one_with(
    use_reentrant: bool,
) -> None:
    """The packs of a thread are no matter of another's."""
    model = TwoLayers()
    model.checkpointed = use_reentrant
    hidden = torch.randn(9, 64)
    grads = []

    def step() -> None:
        own = hidden.clone().requires_grad_()
        model(own).square().sum().backward()
        grads.append(own.grad)

    step()
    with packed_sequences([0, 4, 9]):
        model(hidden.clone().requires_grad_()).sum().backward()
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    step()
    assert len(grads) == 3
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"sliding_window": 3}, {"logits_soft_cap": 2.0}]
)
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    """In a thread of its own, because PyTorch 2.13.0 left keys of the dispatcher
    excluded in this test's thread in two of four runs of all tests. Why is not known.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compare_with_compiled, options).result()


def compare_with_compiled(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = TwoLayers(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((2, 20), (2, 31), (50,)):
        hidden = torch.randn(*shape, 64)
        expected, out = model(hidden), compiled(hidden)
        torch.testing.assert_close(out, expected)
        expected_grads = weight_grads(model, expected.square().sum())
        torch.testing.assert_close(
            weight_grads(model, out.square().sum()), expected_grads
        )


def test_compiled_model_sees_packed_sequences() -> None:
    torch.compiler.reset()
    model = TwoLayers()
    compiled = torch.compile(model, backend="aot_eager")
    whole = torch.randn(40, 64)
    torch.testing.assert_close(compiled(whole), model(whole))
    limit = {"recompile_limit": 4, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limit):
        for i in range(1, 20):  # new lengths do not compile anew
            with packed_sequences(cu((i, 40 - i))):
                out, expected = compiled(whole), model(whole)
            torch.testing.assert_close(out, expected)
    torch.testing.assert_close(compiled(whole), model(whole))
    layer = TrainableAttention(4, 32, 2, dropout=0.5)
    compiled_layer = torch.compile(layer, backend="aot_eager")
    inputs = qkv(10)
    torch.manual_seed(3)
    expected = layer(*inputs)
    torch.manual_seed(3)
    assert torch.equal(compiled_layer(*inputs), expected)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}])
def test_autocast(options: dict[str, Any]) -> None:
    layer = TrainableAttention(4, 32, 2, **options)
    q, k, v = qkv(30)
    half = tuple(x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    expected = layer(*half)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    model = TwoLayers(**options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(9, 64)).square().mean()
    loss.backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())


# ------------------------------------------------------------- projections and rotary


def test_rotary_equals_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaAttention,
        LlamaRotaryEmbedding,
    )

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        attn_implementation="sdpa",
    )
    llama = LlamaAttention(config, layer_idx=0)
    ours = TrainableFlashAttention(128, 4, 2, rope_theta=5e5)
    ours.load_state_dict(llama.state_dict())
    hidden = torch.randn(2, 50, 128)
    positions = torch.arange(50).repeat(2, 1) + torch.tensor([[0], [1000]])
    cos_sin = LlamaRotaryEmbedding(config)(hidden, positions)
    expected, _ = llama(hidden, cos_sin, attention_mask=None)
    torch.testing.assert_close(ours(hidden, positions), expected)
    flat = ours(hidden.flatten(0, 1), positions.flatten(), cu_seqlens=cu((50, 50)))
    torch.testing.assert_close(flat.view_as(expected), expected)


def test_default_positions_count_from_0_in_each_sequence() -> None:
    layer = TrainableFlashAttention(64, 4, 2, rope_theta=1e2)
    hidden = torch.randn(sum(LENGTHS), 64)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    expected = layer(hidden, positions, cu_seqlens=cu(LENGTHS))
    assert torch.equal(layer(hidden, cu_seqlens=cu(LENGTHS)), expected)
    with packed_sequences(cu(LENGTHS)):
        assert torch.equal(layer(hidden), expected)
    rows = torch.randn(2, 9, 64)
    assert torch.equal(layer(rows), layer(rows, torch.arange(9)))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])  # padded left
    torch.testing.assert_close(
        layer(rows, attention_mask=mask)[0, 4:], layer(rows[0, 4:])
    )


def test_a_callable_may_rotate() -> None:
    def reverse(
        positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sign = torch.where(positions % 2 == 0, 1.0, -1.0)[:, None, None]
        return q * sign, k * sign

    plain = TrainableFlashAttention(64, 4)
    rotated = TrainableFlashAttention(64, 4, rotary_emb=reverse)
    rotated.load_state_dict(plain.state_dict())
    hidden = torch.randn(6, 64)
    even = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(rotated(hidden, even), plain(hidden))
    assert not torch.allclose(rotated(hidden), plain(hidden))


NAMES = [f"{x}_proj.{y}" for x in "qkvo" for y in ("weight", "bias")]


def test_state_dict_is_the_projections() -> None:
    assert list(TrainableFlashAttention(64, 4, bias=True).state_dict()) == NAMES
    assert list(TrainableFlashAttention(64, 4).state_dict()) == NAMES[::2]
    assert not TrainableAttention(4, 32).state_dict()
    layer = TrainableFlashAttention(64, 4, 2, head_dim=32)
    assert [list(x.shape) for x in layer.parameters()] == [
        [128, 64],
        [64, 64],
        [64, 64],
        [64, 128],
    ]


# ------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    path: Path = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    (path / "config.json").write_text(json.dumps(config))
    model_config = ModelConfig(str(path), skip_tokenizer_init=True, dtype="float32")
    return VllmConfig(model_config=model_config)


@pytest.fixture
def engine(vllm_config: VllmConfig) -> VllmConfig:
    vllm_config = copy.copy(vllm_config)
    vllm_config.compilation_config = copy.copy(vllm_config.compilation_config)
    vllm_config.compilation_config.static_forward_context = {}
    return vllm_config


def test_built_in_an_engine_it_is_the_same_module(engine: VllmConfig) -> None:
    from vllm.model_executor.layers.attention import Attention

    outside = TrainableFlashAttention(128, 4, 2, rope_theta=1e4, sliding_window=9)
    with set_current_vllm_config(engine):
        inside = TrainableFlashAttention(128, 4, 2, rope_theta=1e4, sliding_window=9)
    assert list(inside.state_dict()) == list(outside.state_dict())
    inside.load_state_dict(outside.state_dict())  # strict, both ways
    outside.load_state_dict(inside.state_dict())
    paged = [x for x in inside.modules() if isinstance(x, Attention)]
    assert len(paged) == 1  # vLLM finds it when it processes weights
    assert paged[0].sliding_window == 9
    assert paged[0].impl.scale == inside.attn.scale
    hidden = torch.randn(6, 128, requires_grad=True)
    assert torch.equal(inside(hidden), outside(hidden))
    inside(hidden).sum().backward()  # not in a step: trains
    with engine_step(engine):  # without requests, as in warm-up
        assert inside(hidden, torch.arange(6)).shape == hidden.shape


@contextmanager
def engine_step(
    engine: VllmConfig, calls: AttentionCalls | None = None
) -> Iterator[EngineStep]:
    with (
        torch.no_grad(),
        set_forward_context(None, engine),
        EngineStep(calls or AttentionCalls()) as step,
    ):
        yield step


def test_a_step_of_another_thread_is_none_of_a_trainers(engine: VllmConfig) -> None:
    with set_current_vllm_config(engine):
        layer = TrainableAttention(4, 32, 2)
    model = nn.Sequential(layer)
    with set_current_vllm_config(engine), engine_step(engine) as step:
        calls = step._calls
        with a_kv_cache_for_each_call(model, calls):
            pass
    inputs = qkv(6)
    expected = layer(*inputs, cu_seqlens=cu((3, 3)))
    outs = []

    def train() -> None:
        outs.append(layer(*inputs, cu_seqlens=cu((3, 3))))
        with torch.no_grad():  # as a trainer does for its old log-probabilities
            outs.append(layer(*inputs, cu_seqlens=cu((3, 3))))

    thread = threading.Thread(target=train)
    with engine_step(engine):
        thread.start()
        thread.join()
    train()  # nor is one that is over
    assert len(outs) == 4 and all(torch.equal(out, expected) for out in outs)
    # whoever calls with gradients is no engine, even where it calls its model
    with set_forward_context(None, engine), EngineStep(calls):
        assert current_step() is None


def test_a_compiled_layer_asks_at_every_call(engine: VllmConfig) -> None:
    torch.compiler.reset()
    with set_current_vllm_config(engine):
        layer = TrainableAttention(4, 32, 2)
    layer.steps_are_marked = True
    compiled = torch.compile(layer, backend="aot_eager")
    inputs = tuple(x.detach() for x in qkv(6))
    expected = layer(*inputs)
    calls = AttentionCalls()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(*inputs), expected)
            with engine_step(engine, calls):
                assert not compiled(*inputs).any()  # no requests
    assert calls.counts == {"trainable_attention.0": 1}


def test_each_call_of_a_step_has_a_kv_cache(engine: VllmConfig) -> None:
    inputs = qkv(3)
    with set_current_vllm_config(engine):
        model = nn.ModuleDict({"a": TrainableAttention(4, 32, 2), "b": nn.Identity()})
        model["b"] = TrainableAttention(4, 32, 2)
        model["alias"] = model["a"]
        unused = model["unused"] = TrainableAttention(4, 32, 2)
        names = list(model.state_dict())
        calls = AttentionCalls()
        with a_kv_cache_for_each_call(model, calls), engine_step(engine, calls):
            for name in ("a", "b", "alias"):
                model[name](*inputs)
    assert list(model.state_dict()) == names
    assert list(engine.compilation_config.static_forward_context) == [
        f"trainable_attention.{i}" for i in (0, 1, 2, 3)
    ]
    (second,) = model["a"].paged_later
    assert second.layer_name == "trainable_attention.3"
    assert second.kv_cache_torch_dtype == model["a"].paged.kv_cache_torch_dtype
    assert model["b"].paged_later is unused.paged_later is None
    for called, message in (
        ("ab", "'a' was called 1 times .* 2 times when"),
        ("aaba", "'a' was called at least 3 times .* 2 times when"),
        ("aa", "'b' was called 0 times .* 1 times when"),
    ):
        with (
            pytest.raises(RuntimeError, match=message),
            engine_step(engine, calls),
        ):
            for name in called:
                model[name](*inputs)
    with engine_step(engine, calls):
        for name in "aba":
            model[name](*inputs)


def test_engine_prefixes(engine: VllmConfig) -> None:
    with set_current_vllm_config(engine):
        for _ in range(2):
            TrainableAttention(4, 32)
        TrainableFlashAttention(128, 4, prefix="model.layers.7.self_attn")
        TrainableAttention(4, 32)
        with pytest.raises(ValueError, match="'model.attn' must contain exactly one"):
            TrainableAttention(4, 32, prefix="model.attn")
        with pytest.raises(ValueError, match="Duplicate"):
            TrainableAttention(4, 32, prefix="trainable_attention.0")
    assert list(engine.compilation_config.static_forward_context) == [
        "trainable_attention.0",
        "trainable_attention.1",
        "model.layers.7.self_attn.attn",
        "trainable_attention.3",
    ]


def test_window_is_the_layers_not_the_configs(engine: VllmConfig) -> None:
    engine.cache_config = copy.copy(engine.cache_config)
    engine.cache_config.sliding_window = 11
    with set_current_vllm_config(engine):
        assert TrainableAttention(4, 32).paged.sliding_window is None
        assert TrainableAttention(4, 32, sliding_window=5).paged.sliding_window == 5
    assert engine.cache_config.sliding_window == 11


def test_engine_errors(engine: VllmConfig) -> None:
    inputs = qkv(3)
    outside = TrainableAttention(4, 32, 2)
    with set_current_vllm_config(engine):
        inside = TrainableFlashAttention(128, 4, 2, rope_theta=1e4)
        full = TrainableAttention(4, 32, 2, causal=False)
        with pytest.raises(ValueError, match="(?s)48.*32, 64"):
            TrainableAttention(4, 48)
    full(*inputs)  # a vision encoder in a model that generates
    with engine_step(engine):
        with pytest.raises(RuntimeError, match="no engine built it"):
            outside(*inputs)
        with pytest.raises(RuntimeError, match="pooling models only"):
            full(*inputs)
        with pytest.raises(ValueError, match="positions must be given"):
            inside(torch.randn(3, 128))
        with pytest.raises(ValueError, match="vLLM knows the sequences"):
            inside(torch.randn(3, 128), torch.arange(3), cu_seqlens=cu((3,)))


def test_without_a_model_config_no_engine_is_building() -> None:
    with set_current_vllm_config(VllmConfig()):
        assert TrainableAttention(4, 32).paged is None


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\).*multiple.*\(3\)"),
        ({"num_heads": 4, "num_kv_heads": 0}, r"num_heads \(4\).*multiple.*\(0\)"),
        ({"num_heads": 4, "head_dim": 0}, "head_dim must be positive, got 0"),
        ({"num_heads": 4, "dropout": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"num_heads": 4, "sliding_window": 0}, "at least 1 .*got 0"),
        ({"num_heads": 4, "logits_soft_cap": 0.0}, "positive, got 0.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainableAttention(**({"head_dim": 32} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 65}, r"hidden_size \(65\) is not a multiple"),
        ({"head_dim": 33, "rope_theta": 1e4}, "even head_dim, got 10000.0 and 33"),
        ({"rope_theta": 0.0}, "positive rope_theta"),
        ({"rope_theta": 1e4, "rotary_emb": max}, "not both"),
    ],
)
def test_bad_flash_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainableFlashAttention(**({"hidden_size": 64, "num_heads": 4} | arguments))


def test_bad_shapes_and_dtypes() -> None:
    layer = TrainableAttention(4, 32, 2)
    q, k, v = qkv(6)
    with pytest.raises(ValueError, match=r"key must have shape \[..., 2, 32\].*4, 32"):
        layer(q, q, v)
    with pytest.raises(ValueError, match=r"query must have shape \[..., 128\]"):
        layer(q.flatten(1)[:, :64], k.flatten(1), v.flatten(1))
    with pytest.raises(ValueError, match=r"share their leading.*\[5, 2, 32\]"):
        layer(q, k[:5], v)
    with pytest.raises(ValueError, match="share their leading"):
        layer(q[None, None], k[None, None], v[None, None])
    with pytest.raises(TypeError, match="float32, torch.float64, torch.float32"):
        layer(q, k.double(), v)
    with pytest.raises(TypeError, match="torch.int64"):
        layer(q.long(), k.long(), v.long())
    flash = TrainableFlashAttention(64, 4)
    with pytest.raises(ValueError, match="They come first, positions second"):
        flash(torch.arange(6), torch.randn(6, 64))


def test_bad_sequences() -> None:
    layer = TrainableAttention(4, 32, 2)
    packed = qkv(6)
    rows = tuple(x.unflatten(0, (2, 3)) for x in packed)
    with pytest.raises(ValueError, match="ends at 5, but the packed batch has 6"):
        layer(*packed, cu_seqlens=cu((2, 3)))
    with pytest.raises(ValueError, match=r"never decrease, got \[3, 3\]"):
        layer(*packed, cu_seqlens=torch.tensor([3, 3]))
    for floats in (torch.tensor([0.0, 6.0]), [0.0, 6.0], []):
        with pytest.raises(ValueError, match=r"int32 tensor .* got torch.float32"):
            layer(*packed, cu_seqlens=floats)
    for nothing in ("06", [0, None], object(), {0: 6}):
        with pytest.raises(TypeError, match="cu_seqlens must be an int32 tensor"):
            layer(*packed, cu_seqlens=nothing)
        with (
            pytest.raises(TypeError, match="cu_seqlens must be an int32 tensor"),
            packed_sequences(nothing),
        ):
            pass
    with (
        pytest.raises(ValueError, match=r"got torch.int32 of shape \[0\]"),
        packed_sequences(torch.empty(0, dtype=torch.int32)),
    ):
        pass
    with pytest.raises(ValueError, match="the batch has 2 rows of 3"):
        layer(*rows, cu_seqlens=cu((3, 3)))
    with packed_sequences(cu((3, 3))), pytest.raises(ValueError, match="2 rows of 3"):
        layer(*rows)
    mask = torch.ones(2, 3)
    with pytest.raises(TypeError, match="bool or integer.*float32"):
        layer(*rows, attention_mask=mask)
    with pytest.raises(ValueError, match=r"shape \[2, 3\] for leading axes \[6\]"):
        layer(*packed, attention_mask=mask.bool())
    with pytest.raises(ValueError, match="not both"):
        layer(*rows, cu_seqlens=cu((3, 3)), attention_mask=mask.bool())
    layer(*packed)  # and nothing is left behind
