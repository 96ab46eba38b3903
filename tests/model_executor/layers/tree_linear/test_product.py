# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tree product: its values, and that its bits depend on no shape and no layout.

On a CPU the compiled operator is tested, and the Triton kernels in Triton's
interpreter; on a GPU (`-m gpu`) the compiled kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import interpret

import vllm.envs as envs
from vllm.model_executor.layers.tree_linear.linear import divided_linear, whole_linear
from vllm.model_executor.layers.tree_linear.product import (
    round_sum,
    tree_product,
    tree_total,
)
from vllm.model_executor.layers.tree_linear.tree import number_of_leaves, tree_sum

LEAVES = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
# Rows, outputs and features: tiles with and without edges, and short leaves.
SHAPES = [(67, 150, 1024), (5, 33, 40), (130, 8, 576), (1, 257, 2048)]
LARGE_SHAPES = [(700, 3072, 2048), (300, 2048, 8192)]


def factors(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    rows, outputs, features = shape
    sizes = (rows, features), (outputs, features), (outputs,)
    made = (torch.randn(size, generator=generator) for size in sizes)
    return [x.to(device, dtype) for x in made]


def of_parts(product, x, weight, ranks):
    """What `ranks` ranks have each, `[ranks, rows, outputs]`."""
    pairs = zip(x.chunk(ranks, 1), weight.chunk(ranks, 1), strict=True)
    return torch.stack([product(a, b, None, LEAVES // ranks, True) for a, b in pairs])


def check_bits(product, x, weight, bias) -> None:
    """Equal bits for any rows, any outputs, and any number of ranks."""
    rows, outputs = x.shape[0], weight.shape[0]
    whole = product(x, weight, bias, LEAVES, False)
    total = product(x, weight, None, LEAVES, True)
    assert whole.dtype == x.dtype and whole.shape == (rows, outputs)
    assert torch.equal(round_sum(total, bias, x.dtype), whole)
    for ranks in (2, 4, 8):
        parts = of_parts(product, x, weight, ranks)
        assert torch.equal(tree_sum(parts), total), ranks
        assert torch.equal(tree_total(parts, bias, x.dtype), whole), ranks
    one_leaf = product(x, weight, bias, 1, False)
    for leaves, expected in ((LEAVES, whole), (1, one_leaf)):
        for n in {1, 2, 3, rows // 2, rows - 1} - {0}:
            assert torch.equal(
                product(x[:n], weight, bias, leaves, False), expected[:n]
            )
            last = product(x[-n:].contiguous(), weight, bias, leaves, False)
            assert torch.equal(last, expected[-n:]), (leaves, n)
        for n in {1, 3, outputs // 4, outputs // 2, outputs - 1} - {0}:
            first = product(x, weight[:n], bias[:n], leaves, False)
            assert torch.equal(first, expected[:, :n]), (leaves, n)
            other = product(x, weight[n:], bias[n:], leaves, False)
            assert torch.equal(other, expected[:, n:]), (leaves, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_cpu(shape, dtype) -> None:
    x, weight, bias = factors(shape, dtype)
    check_bits(tree_product, x, weight, bias)
    out = tree_product(x, weight, bias, LEAVES, False)
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES[:2], torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE_SHAPES], ids=str)
def test_on_a_gpu(shape, dtype) -> None:
    x, weight, bias = factors(shape, dtype, "cuda")
    check_bits(tree_product, x, weight, bias)
    out = tree_product(x, weight, bias, LEAVES, False)
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=2**-8)


def interpreted() -> list[float]:
    """Errors of the kernels, whose bits are checked; run by the interpreter."""
    from vllm.model_executor.layers.tree_linear import triton_product

    errors = []
    for shape in [(67, 150, 320), (5, 33, 40)]:
        for dtype in (torch.float32, torch.float16):
            x, weight, bias = factors(shape, dtype)
            bits = []
            for busy in (1, 4, 128):  # more and more programs share a tile
                triton_product.BUSY = busy
                product = triton_product.triton_tree_product
                bits.append(product(x, weight, bias, LEAVES, False))
                parts = of_parts(product, x, weight, 2)
                total = triton_product.triton_tree_total(parts, bias, dtype)
                assert torch.equal(total, bits[0])
                assert torch.equal(product(x[:3], weight, bias, 8, False), bits[0][:3])
            assert torch.equal(bits[0], bits[1]) and torch.equal(bits[0], bits[2])
            exact = F.linear(x.double(), weight.double(), bias.double())
            errors.append(float((bits[0].double() - exact).norm() / exact.norm()))
    return errors


def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton.runtime.interpreter")
    assert max(interpret(__file__, "interpreted")) < 4.9e-4


@pytest.mark.parametrize("leaves", [1, 8])
def test_gradients(leaves) -> None:
    tensors = factors((7, 12, 16), torch.float64)
    x, weight, bias = (tensor.requires_grad_() for tensor in tensors)
    x = x.unflatten(0, (1, 7))  # any leading axes

    def linear(*tensors):
        if leaves == 1:
            return whole_linear(*tensors)
        return divided_linear(*tensors, leaves)

    assert torch.autograd.gradcheck(linear, (x, weight, bias))
    assert linear(x, weight, None).shape == (1, 7, 12)


def test_autocast() -> None:
    x, weight, bias = factors((7, 12, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = whole_linear(x, weight.requires_grad_(), bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_number_of_leaves(monkeypatch) -> None:
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", False, raising=False)
    assert number_of_leaves(1024) == 1
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT_LEAVES", 8, raising=False)
    assert number_of_leaves(1024) == number_of_leaves(1024, 2) == 8
    assert number_of_leaves(1024, 8) == 8
    assert number_of_leaves(12) == number_of_leaves(12, 4) == 4
    # ranks that cannot hold whole subtrees
    assert number_of_leaves(12, 3) == number_of_leaves(1024, 16) == 1
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT_LEAVES", 6, raising=False)
    with pytest.raises(ValueError, match="is 6; expected a power of two"):
        number_of_leaves(1024)
