# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`TrainableAttention` by vLLM's flash attention, on a GPU.

Errors are relative, against float64, and bounded by those of the same computation by
its definition in the same dtype.
"""

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_definition import attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.layers import TrainableAttention, TrainableFlashAttention
from vllm.model_executor.layers.trainable_attention import packed_sequences
from vllm.v1.attention.training import flash
from vllm.v1.attention.training.backward import (
    BACKWARD_ENGINES,
    BACKWARD_VARIABLE,
    _available_engines,
    select_backward,
)

pytestmark = pytest.mark.gpu

LENGTHS = (0, 1, 130, 0, 512, 777)
# Flash attention sums in float32 where the definition in bfloat16 rounds each score.
FACTOR = 1.1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def cu(lengths: tuple[int, ...]) -> torch.Tensor:
    ends = torch.tensor(lengths, device="cuda").cumsum(0, dtype=torch.int32)
    return F.pad(ends, (1, 0))


def qkv(
    tokens: int,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(tokens, n, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )


def errors(layer: TrainableAttention, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Of the output and of every gradient: ours, and the definition's in `dtype`."""
    inputs = qkv(
        sum(LENGTHS), layer.num_heads, layer.num_kv_heads, layer.head_dim, dtype
    )
    out = layer(*inputs, cu_seqlens=cu(LENGTHS))
    grad = torch.randn_like(out)
    sinks = [] if layer.sinks is None else [layer.sinks]
    ours = (out, *torch.autograd.grad(out, (*inputs, *sinks), grad))

    def evaluate(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        cast = [x.detach().to(dtype).requires_grad_() for x in (*inputs, *sinks)]
        out = attention(layer, *cast[:3], cast[3] if sinks else None, LENGTHS)
        return (out, *torch.autograd.grad(out, cast, grad.to(dtype)))

    exact, plain = evaluate(torch.float64), evaluate(dtype)
    assert all(torch.isfinite(x).all() for x in ours)
    return [
        tuple(float((x.double() - e).norm() / e.norm()) for x in (our, definitions))
        for our, definitions, e in zip(ours, plain, exact, strict=True)
    ]


def assert_uses(kernel: Any, layer: TrainableAttention, x: torch.Tensor) -> None:
    from vllm.v1.attention.training.kernel import AttentionParams

    params = AttentionParams(
        layer.scale,
        layer.causal,
        layer.sliding_window,
        layer.logits_soft_cap,
        layer.dropout,
        layer.deterministic,
        layer.sinks,
    )
    assert kernel(x, params) is None


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"scale": 0.3},
    {"sliding_window": 100},
    {"sliding_window": 100, "causal": False},
    {"sinks": True},
    {"sinks": True, "sliding_window": 100},
    {"deterministic": True},
    {"logits_soft_cap": 2.0},
]
ENGINE_AND_OPTIONS = [
    (engine, options)
    for engine, options in itertools.product(BACKWARD_ENGINES, OPTIONS)
    if BACKWARD_ENGINES[engine].refuses(
        64, options.get("logits_soft_cap", 0.0), options.get("deterministic", False)
    )
    is None
]


@pytest.mark.parametrize("engine, options", ENGINE_AND_OPTIONS, ids=str)
def test_every_backward_engine(engine, options, monkeypatch) -> None:
    if not BACKWARD_ENGINES[engine].available():
        pytest.skip(f"{engine} is not installed")
    monkeypatch.setenv(BACKWARD_VARIABLE, engine)
    layer = TrainableAttention(8, 64, 2, **options).cuda()
    if layer.sinks is not None:
        nn.init.normal_(layer.sinks)
    assert_uses(flash.unsupported, layer, qkv(1)[0])
    for ours, plain in errors(layer, torch.bfloat16):
        assert ours <= FACTOR * plain


HEAD_SHAPES = [
    (head_dim, kv_heads, torch.bfloat16)
    for head_dim in (64, 96, 128, 192, 256)
    for kv_heads in (8, 2, 1)
]


@pytest.mark.parametrize(
    "head_dim, kv_heads, dtype", [*HEAD_SHAPES, (64, 2, torch.float16)], ids=str
)
def test_head_shapes(head_dim, kv_heads, dtype) -> None:
    layer = TrainableAttention(8, head_dim, kv_heads)
    assert_uses(flash.unsupported, layer, qkv(1, 8, 1, head_dim, dtype)[0])
    for ours, plain in errors(layer, dtype):
        assert ours <= FACTOR * plain


@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"sinks": True}])
def test_deterministic_gradients_have_equal_bits(options) -> None:
    layer = TrainableAttention(8, 128, 2, deterministic=True, **options).cuda()
    inputs = qkv(sum(LENGTHS), head_dim=128)
    grad = torch.randn_like(inputs[0])
    runs = [
        torch.autograd.grad(layer(*inputs, cu_seqlens=cu(LENGTHS)), inputs, grad)
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@pytest.mark.parametrize(
    "head_dim, kv_heads", [(64, 8), (80, 8), (96, 8), (128, 8), (128, 2), (256, 8)]
)
def test_tritons_gradient_has_no_race(head_dim, kv_heads, monkeypatch) -> None:
    monkeypatch.setenv(BACKWARD_VARIABLE, "triton")
    layer = TrainableAttention(8, head_dim, kv_heads, deterministic=True)
    inputs = qkv(sum(LENGTHS), 8, kv_heads, head_dim)
    grad = torch.randn_like(inputs[0])
    runs = [
        torch.autograd.grad(layer(*inputs, cu_seqlens=cu(LENGTHS)), inputs, grad)
        for _ in range(8)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))
    for ours, plain in errors(layer, torch.bfloat16):
        assert ours <= FACTOR * plain


def test_opcheck() -> None:
    q, k, v = qkv(300)
    sinks = torch.zeros(8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offsets = cu((100, 200))
    options = (200, 0.125, True, -1, -1, 0.0, False)
    forward = torch.ops.vllm.flash_attn_training.default
    for sink in (None, sinks):
        # aten's backward is not deterministic, which opcheck's comparison needs.
        torch.library.opcheck(forward, (q, k, v, sink, offsets, *options[:-1], True))
    out, lse = forward(q, k, v, None, offsets, *options)
    plain = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(
        torch.ops.vllm.flash_attn_training_backward.default,
        (*plain, offsets, *options[:-1], True),
    )


def rows(batch: int = 2, seq: int = 256) -> tuple[torch.Tensor, ...]:
    return tuple(
        x.detach().unflatten(0, (batch, seq)).requires_grad_() for x in qkv(batch * seq)
    )


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"logits_soft_cap": 2.0}])
def test_compiles_to_one_graph(options) -> None:
    layer = TrainableAttention(8, 64, 2, deterministic=True, **options).cuda()
    compiled = torch.compile(layer, fullgraph=True)
    for seq in (256, 320):  # the second with a dynamic shape
        inputs = rows(seq=seq)
        grad = torch.randn_like(inputs[0])
        out, expected = compiled(*inputs), layer(*inputs)
        assert torch.equal(out, expected)
        for x, y in zip(
            torch.autograd.grad(out, inputs, grad),
            torch.autograd.grad(expected, inputs, grad),
            strict=True,
        ):
            assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(options, use_reentrant) -> None:
    deterministic = "dropout" not in options
    layer = TrainableAttention(8, 64, 2, deterministic=deterministic, **options).cuda()
    inputs = qkv(sum(LENGTHS))
    grad = torch.randn_like(inputs[0])
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        with packed_sequences(cu(LENGTHS)):
            if recompute:
                out = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
            else:
                out = layer(*inputs)
            out.backward(grad)
        results.append((out.detach(), *(x.grad for x in inputs)))
        for x in inputs:
            x.grad = None
    for x, y in zip(*results, strict=True):
        # With dropout the backward adds in any order; the dropped weights are equal.
        assert (x - y).norm() <= (0 if deterministic else 1e-2) * x.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype) -> None:
    layer = TrainableFlashAttention(256, 4, 2, rope_theta=100.0).cuda()
    hidden = torch.randn(300, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        out = layer(hidden)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    plain = layer(hidden.detach())  # float32, by another kernel
    assert (out - plain).norm() <= 4 * torch.finfo(dtype).eps * plain.norm()
    for parameter in (hidden, *layer.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and parameter.grad.norm() > 0


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TrainableFlashAttention(256, 4, 2, rope_theta=100.0) for _ in range(2)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


def gradients(model: nn.Module, hidden: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(hidden).float().square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def process_group():
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2(process_group) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = TwoLayers().cuda()
    hidden = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16)
    plain = gradients(model.bfloat16(), hidden)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for x, y in zip(gradients(model, hidden), plain, strict=True):
        assert (x.full_tensor() - y).norm() <= 1e-2 * y.norm()


def test_cuda_graph_of_a_training_step() -> None:
    model = TwoLayers().cuda().bfloat16()
    for layer in model.layers:
        layer.attn.deterministic = True
    static = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16)
    step = functools.partial(gradients, model, static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        static.normal_()
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(map(torch.equal, replayed, step()))


def test_dropout_is_the_definition_with_its_own_mask() -> None:
    dropout, tokens, heads, head_dim = 0.25, 128, 4, 128
    layer = TrainableAttention(heads, head_dim, causal=False, dropout=dropout)
    q, k, v = qkv(tokens, heads, heads, head_dim)
    assert_uses(flash.dropout_unsupported, layer, q)
    torch.manual_seed(1)
    identity = torch.eye(tokens, device="cuda", dtype=q.dtype)
    # With the identity for values the output is what is left of the weights.
    weights = layer(q, k, identity[:, None].expand(-1, heads, -1))
    kept = (weights != 0).transpose(0, 1)  # [heads, queries, keys]
    assert abs(float(kept.float().mean()) - (1 - dropout)) < 0.01
    torch.manual_seed(1)
    out = layer(q, k, v)
    grad = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, (q, k, v), grad))

    def evaluate(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        qd, kd, vd = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
        scores = torch.einsum("qhd,khd->hqk", qd, kd) * layer.scale
        probs = scores.softmax(-1) * kept / (1 - dropout)
        out = torch.einsum("hqk,khd->qhd", probs, vd)
        return (out, *torch.autograd.grad(out, (qd, kd, vd), grad.to(dtype)))

    exact, plain = evaluate(torch.float64), evaluate(q.dtype)
    for x, p, e in zip(ours, plain, exact, strict=True):
        assert (x.double() - e).norm() <= FACTOR * (p.double() - e).norm()
    layer.eval()
    assert torch.equal(layer(q, k, v), layer(q, k, v))


def test_strided_inputs() -> None:
    layer = TrainableAttention(8, 64, 2, deterministic=True)
    q, k, v = (x.detach() for x in qkv(300))
    grad = torch.randn_like(q)

    def run(*qkv: torch.Tensor, grad: torch.Tensor = grad) -> tuple[torch.Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in qkv]
        out = layer(*inputs)
        return (out, *torch.autograd.grad(out, inputs, grad))

    fused = torch.cat((q, k, v), dim=1)
    strided = run(*fused.split((8, 2, 2), dim=1))
    transposed = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (strided, run(q, k, v, grad=transposed)):
        assert all(map(torch.equal, run(q, k, v), other))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (1, 0, 1)])
def test_short_and_empty_sequences(lengths) -> None:
    layer = TrainableAttention(8, 64, 2)
    inputs = qkv(sum(lengths))
    out = layer(*inputs, cu_seqlens=cu(lengths) if lengths else cu((0,)))
    assert out.shape == inputs[0].shape
    # A lone token attends to itself alone.
    assert torch.equal(out, inputs[2].repeat_interleave(4, dim=1))
    gradient = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(torch.isfinite(x).all() for x in gradient)


def test_more_than_2_to_the_31_elements() -> None:
    lengths = (4096,) * 140  # times 32 heads of 128: 2.3e9
    heads, head_dim, last = 32, 128, 4096
    layer = TrainableAttention(heads, head_dim, 1, deterministic=True)
    q = torch.empty(
        sum(lengths), heads, head_dim, device="cuda", dtype=torch.bfloat16
    ).normal_()
    assert q.numel() > 2**31
    k, v = (torch.randn_like(q[:, :1]) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = layer(*inputs, cu_seqlens=cu(lengths))
    grads = torch.autograd.grad(out, inputs, out.detach())
    alone = [x.detach()[-last:].clone().requires_grad_() for x in inputs]
    expected = layer(*alone)
    expected_grads = torch.autograd.grad(expected, alone, expected.detach())
    for x, y in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(x[-last:], y, rtol=1e-2, atol=1e-2)


def test_the_fastest_engine_is_chosen(monkeypatch) -> None:
    monkeypatch.delenv(BACKWARD_VARIABLE, raising=False)
    first = next(iter(_available_engines()))
    assert select_backward(64, 0.0, False) is BACKWARD_ENGINES[first]
