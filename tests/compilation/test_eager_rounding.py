# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import metrics
from torch.fx.experimental.proxy_tensor import make_fx

from vllm.compilation.eager_rounding import (
    EagerRoundingPass,
    functions_of_equal_bits,
    options_for,
    same_bits,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float32]
HIDDEN, HEADS = 256, 4


class Block(nn.Module):
    """What a decoder layer has between its attention and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, HIDDEN)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        heads = (F.silu(gate) * up).unflatten(-1, (HEADS, -1))
        first, second = heads.chunk(2, dim=-1)
        rotated = heads * cos + torch.cat((-second, first), dim=-1) * sin
        out = x + 0.3 * self.down(F.gelu(rotated.flatten(1), approximate="tanh"))
        wide = gate.float()  # sums of products, which a compiler likes to contract
        return out, wide * wide + wide * 1.1 - 0.7 * wide, torch.sigmoid(gate) - up


def inputs(tokens: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = (tokens, HIDDEN), *2 * [(tokens, 1, HIDDEN // HEADS)]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in sizes]


def differences(options: dict[str, Any], dtype: torch.dtype, device: str) -> int:
    """How many of `Block`'s outputs have other bits when compiled, over four sizes."""
    torch.manual_seed(0)
    block = Block().to(device, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(block, dynamic=True, fullgraph=True, options=options)
    differ = 0
    with torch.no_grad():
        for tokens in (3, 64, 777, 2048):
            x = inputs(tokens, dtype, device)
            pairs = zip(compiled(*x), block(*x), strict=True)
            differ += sum(not torch.equal(a, b) for a, b in pairs)
    return differ


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_bits_are_those_of_eager_execution(dtype, device) -> None:
    metrics.reset()
    options = options_for(dtype, device) | {"fx_graph_cache": False}
    assert differences(options, dtype, device) == 0
    assert metrics.generated_kernel_count > 0  # so something was fused
    assert differences({}, dtype, device) > 0  # so the comparison can tell


@pytest.mark.parametrize("device", DEVICES)
def test_functions_are_tried_on_all_values(device) -> None:
    expected = {"gelu_tanh"}
    if (
        device == "cpu"
    ):  # on a GPU the relu of -0.0 has another sign when it is compiled
        expected.add("relu")
    for dtype in (torch.bfloat16, torch.float16):
        assert expected <= functions_of_equal_bits(dtype, device)
    assert functions_of_equal_bits(torch.float32, device) == frozenset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_compared_and_not_values(dtype) -> None:
    def bits(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int16).view(dtype)

    assert same_bits(bits(0, 0x7FFF), bits(0, 0x7FF1))  # NaNs
    assert same_bits(bits(0x7FFF), bits(-1))
    assert not same_bits(bits(0), bits(-(2**15)))  # 0.0 and -0.0
    assert not same_bits(bits(0x3C00), bits(0x3C01))
    assert not same_bits(bits(0x7FFF), bits(0))


def marked(function: Any, *arguments: torch.Tensor) -> set[str]:
    """Names of the operators of `function` that the pass lets Inductor fuse."""
    traced = make_fx(lambda *x: function(*x), tracing_mode="symbolic")(*arguments)
    EagerRoundingPass(frozenset({"silu", "gelu_tanh"}))(traced.graph)
    traced.recompile()
    assert torch.equal(traced(*arguments), function(*arguments))
    return {str(node.target) for node in traced.graph.nodes if "custom" in node.meta}


X = torch.linspace(-2, 2, 60, dtype=torch.bfloat16).unflatten(0, (-1, 6))


def test_an_approximation_that_passed_its_trial_is_fused() -> None:
    assert "aten.exp.default" in marked(F.silu, X)
    assert marked(F.gelu, X) == set()  # another than gelu_tanh
    assert "aten.tanh.default" in marked(lambda x: F.gelu(x, approximate="tanh"), X)


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        lambda x: torch.add(x, x, alpha=3),  # a product and a sum
        lambda x: x + x.float(),  # another dtype
        lambda x: x.softmax(-1),
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: x @ x.mT,
    ],
    ids=["function", "alpha", "dtypes", "softmax", "norm", "product"],
)
def test_the_rest_is_left_to_eager_kernels(function) -> None:
    arithmetic = {"aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"}
    assert not marked(function, X) & (arithmetic | {"aten.exp.default"})


def test_weights_that_are_transposed_are_lowered() -> None:
    # aten.t has no lowering of its own.
    assert marked(lambda x: x.t() + 1, X) >= {"aten.permute.default", "aten.add.Tensor"}
