# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The CPU operator of `csrc/`: its errors beside SDPA's, and life without it."""

import itertools
import logging
import shutil

import pytest
import torch
import torch.nn.functional as F

from vllm.v1.attention.training import cpu
from vllm.v1.attention.training.kernel import AttentionParams
from vllm.v1.attention.training.select import select_kernel
from vllm.v1.attention.training.sequences import Sequences

LENGTHS = (1, 0, 33, 130, 300, 0, 64)
HEADS = [(8, 2, 64), (4, 4, 128), (6, 1, 32), (12, 4, 96), (8, 8, 256), (128, 1, 32)]
PARAMS = AttentionParams(
    scale=0.125,
    causal=True,
    sliding_window=None,
    logits_soft_cap=None,
    dropout=0.0,
    deterministic=False,
)
COMPILED = bool(cpu._DTYPES)
compiled = pytest.mark.skipif(not COMPILED, reason="no compiled operators here")
takes = pytest.mark.parametrize("dtype", cpu._DTYPES or [None])


def test_it_is_compiled_where_it_can_be():
    if shutil.which("cmake") and shutil.which("c++"):
        assert COMPILED, "`python -m tools develop` compiles it, or says why not."


def sequences_of(lengths: tuple[int, ...]) -> Sequences:
    offsets = list(itertools.accumulate(lengths, initial=0))
    return Sequences.from_cu_seqlens(torch.tensor(offsets, dtype=torch.int32))


def inputs(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tokens: int
) -> list[torch.Tensor]:
    """q, k, v and the output's gradient."""
    torch.manual_seed(0)
    shapes = [(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def results(attend, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v."""
    *qkv, grad = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def sdpa(params: AttentionParams, lengths: tuple[int, ...]):
    """PyTorch's attention of each sequence, with its mask spelt out for a window."""

    def attend(q, k, v):
        outs = []
        for rows in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            distance = torch.arange(len(rows[0]))
            distance = distance.unsqueeze(1) - distance
            mask = distance >= 0 if params.causal else distance == distance
            if params.sliding_window is not None:
                mask &= distance.abs() < params.sliding_window
            out = F.scaled_dot_product_attention(
                *(x.transpose(0, 1).unsqueeze(0) for x in rows),
                attn_mask=mask,
                scale=params.scale,
                enable_gqa=True,
            )
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs)

    return attend


@compiled
@takes
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "causal, window", [(True, None), (False, None), (True, 5), (False, 40), (True, 200)]
)
def test_no_less_exact_than_sdpa(heads, causal, window, dtype):
    params = PARAMS._replace(causal=causal, sliding_window=window)
    tensors = inputs(*heads, dtype, sum(LENGTHS))
    sequences = sequences_of(LENGTHS)
    assert select_kernel(*tensors[:2], sequences, params) is (cpu.cpu_attention)
    exact = results(sdpa(params, LENGTHS), [x.double() for x in tensors])
    peer = results(sdpa(params, LENGTHS), tensors)
    ours = results(
        lambda *qkv: cpu.cpu_attention(*qkv, sequences, params),
        tensors,
    )
    # How SDPA adds depends on the processor. Wherever it adds better than one product
    # after another, this is what the sums of 64 products may lose in the scores: their
    # roundings, uniform in half a unit, walk at random.
    unit = torch.finfo(torch.float32).eps / 2
    walk = unit * params.scale * heads[2] ** 0.5 * (64 / 2 / 3) ** 0.5
    for name, x, p, e in zip(("out", "dq", "dk", "dv"), ours, peer, exact, strict=True):
        error, peers = ((y.double() - e).norm() / e.norm() for y in (x, p))
        # sums in another order, and oneDNN's of pairs in bfloat16
        assert error <= 1.5 * max(peers, walk), (name, error, peers, walk)


@compiled
@takes
def test_strides_of_a_fused_projection(dtype):
    sequences = sequences_of((70, 5))
    fused = torch.randn(75, 8 + 2 + 2, 64).to(dtype)
    q, k, v = fused.split((8, 2, 2), dim=1)
    grad = torch.randn(8, 64, 75).to(dtype).permute(2, 0, 1)  # no stride of 1 last

    def attend(q, k, v):
        return cpu.cpu_attention(q, k, v, sequences, PARAMS)

    strided = results(attend, [q, k, v, grad])
    dense = results(attend, [x.contiguous() for x in (q, k, v, grad)])
    assert all(map(torch.equal, strided, dense))


@compiled
@takes
@pytest.mark.parametrize("causal, window", [(True, None), (False, 40)])
def test_bits_do_not_depend_on_threads_or_neighbours(dtype, causal, window):
    """Eight threads split the longer sequence."""
    params = PARAMS._replace(causal=causal, sliding_window=window)
    tensors = inputs(8, 2, 64, dtype, 330)

    def attend(*lengths):
        sequences = sequences_of(lengths)
        return lambda *qkv: cpu.cpu_attention(*qkv, sequences, params)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(attend(300, 30), tensors)
        torch.set_num_threads(8)
        threads = results(attend(300, 30), tensors)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, threads, expected))
    alone = results(attend(30), [x[300:] for x in tensors])
    assert all(torch.equal(x, y[300:]) for x, y in zip(alone, expected, strict=True))


@compiled
@takes
def test_opcheck(dtype):
    q, k, v, grad = inputs(4, 2, 32, dtype, 40)
    cu_seqlens = torch.tensor([0, 7, 7, 40], dtype=torch.int32)
    options = (cu_seqlens, 0.2, True, 5)
    out, lse = torch.ops.vllm.packed_attention_cpu(q, k, v, *options)
    torch.library.opcheck(
        torch.ops.vllm.packed_attention_cpu.default,
        (*(x.requires_grad_() for x in (q, k, v)), *options),
    )
    torch.library.opcheck(
        torch.ops.vllm.packed_attention_cpu_backward.default,
        (*(x.detach() for x in (grad, q, k, v, out, lse)), *options),
        test_utils=("test_schema", "test_faketensor"),
    )


@compiled
@takes
def test_compiled_it_is_one_graph_with_the_same_bits(dtype):
    rows = Sequences(num_seqs=3, max_seqlen=40)
    tensors = inputs(4, 2, 64, dtype, 120)

    def attend(q, k, v):
        return select_kernel(q, k, rows, PARAMS)(q, k, v, rows, PARAMS)

    expected = results(attend, tensors)
    traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(traced, tensors), expected))


@compiled
@takes
def test_nan_is_not_hidden(dtype):
    tensors = inputs(2, 1, 32, dtype, 20)
    tensors[0][7] = torch.nan
    sequences = sequences_of((20,))
    out, dq, _, dv = results(
        lambda *qkv: cpu.cpu_attention(*qkv, sequences, PARAMS),
        tensors,
    )
    for x in (out, dq):
        assert x[7].isnan().all()
        assert not x[:7].isnan().any() and not x[8:].isnan().any()
    assert dv[:8].isnan().all() and not dv[8:].isnan().any()


@compiled
@pytest.mark.parametrize(
    "cu_seqlens, message",
    [([0, 5], "cu_seqlens must rise"), ([0, 9, 8], "cu_seqlens must rise")],
)
def test_the_operator_reads_nothing_out_of_bounds(cu_seqlens, message):
    q, k, v, _ = inputs(2, 1, 32, torch.float32, 8)
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vllm.packed_attention_cpu(q, k, v, cu_seqlens, 1.0, True, -1)


@pytest.mark.parametrize(
    "change, dtype, head_dim",
    [
        ({"dropout": 0.1}, torch.float32, 64),
        ({"logits_soft_cap": 5.0}, torch.float32, 64),
        ({"sinks": torch.zeros(4)}, torch.float32, 64),
        ({}, torch.float64, 64),
        ({}, torch.float16, 64),
        ({}, torch.float32, 80),
    ],
)
def test_what_it_does_not_take_goes_to_another_kernel(change, dtype, head_dim):
    params = PARAMS._replace(**change)
    tensors = inputs(4, 2, head_dim, dtype, 12)
    sequences = sequences_of((5, 7))
    kernel = select_kernel(*tensors[:2], sequences, params)
    assert kernel is not cpu.cpu_attention
    assert all(
        x.isfinite().all()
        for x in results(lambda *qkv: kernel(*qkv, sequences, params), tensors)
    )


def test_without_the_operator_there_is_one_notice(monkeypatch, tmp_path):
    notices = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())
    logger = cpu.logger
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "missing.so")
    logger.addHandler(handler)
    try:
        monkeypatch.setattr(cpu, "_DTYPES", cpu._load())
        tensors = inputs(4, 2, 64, torch.float32, sum(LENGTHS))
        sequences = sequences_of(LENGTHS)

        def attend(params):
            kernel = select_kernel(*tensors[:2], sequences, params)
            return results(lambda *qkv: kernel(*qkv, sequences, params), tensors)

        for params in (PARAMS, PARAMS._replace(sliding_window=5)):
            peer = results(sdpa(params, LENGTHS), tensors)
            for x, y in zip(attend(params), peer, strict=True):
                torch.testing.assert_close(x, y)
    finally:
        logger.removeHandler(handler)
    assert len(notices) == 1 and "was not compiled" in notices[0]


def test_a_library_for_another_torch_is_left_out(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "_LIBRARY", broken)
    assert cpu._load() == ()


def test_the_build_goes_on_without_cmake(monkeypatch, tmp_path, capsys):
    from tools import native

    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    assert native.build(tmp_path) is False
    assert "there is no cmake" in capsys.readouterr().err
