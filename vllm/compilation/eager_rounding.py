# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compilation by Inductor that rounds as eager execution does.

An engine that is compiled and a trainer that runs eagerly differ in their last bits: a
fused kernel keeps values in float32 that eager kernels round in between, and it uses
other approximations of functions. Here Inductor fuses only what gives the same bits.
Every other op runs its eager ATen kernel.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from vllm.compilation.passes.inductor_pass import InductorPass

aten = torch.ops.aten

# Operators that only move values.
MOVES = {
    aten.alias.default,
    aten.cat.default,
    aten.clone.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
# Operators with one rounding each, which IEEE 754 prescribes.
ARITHMETIC = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    aten.sub.Tensor,
}
# Approximations: fused if a trial of all values gives the same bits.
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": aten.gelu.default,
    "gelu_tanh": partial(aten.gelu.default, approximate="tanh"),
    "relu": aten.relu.default,
    "sigmoid": aten.sigmoid.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
}
OPTIONS = {
    "emulate_precision_casts": True,  # round between fused operators
    "fallback_by_default": True,  # unmarked operators run their eager kernels
    "selective_decompose": True,
    # These passes replace operators, such as a product and a sum by one addmm.
    "pattern_matcher": False,
    "use_joint_graph_passes": False,
}


@cache
def functions_of_equal_bits(dtype: torch.dtype, device_type: str) -> frozenset[str]:
    """Names of `FUNCTIONS` that Inductor computes as eager execution does.

    Each is tried on all values of a dtype of two bytes; no function of another dtype
    is known to be equal.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return frozenset()
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device_type)
    values = values.view(dtype)

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        return [function(x) for function in FUNCTIONS.values()]

    options: Any = {"emulate_precision_casts": True}
    with torch.no_grad():
        compiled = torch.compile(compute, dynamic=False, options=options)(values)
        return frozenset(
            name
            for name, x, y in zip(FUNCTIONS, compiled, compute(values), strict=True)
            if same_bits(x, y)
        )


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors of a dtype of two bytes have the same bits.

    0.0 and -0.0 differ. NaNs do not, whatever their sign and payload, because IEEE 754
    leaves these open.
    """
    equal = x.view(torch.int16) == y.view(torch.int16)
    return bool((equal | (x.isnan() & y.isnan())).all())


class EagerRoundingPass(InductorPass):
    """Marks what Inductor may fuse, for its option `fallback_by_default`."""

    def __init__(self, functions: frozenset[str]) -> None:
        self.functions = functions

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if self.keeps_bits(node):
                for part in _lowerable(node):
                    part.meta["custom"] = {"compile_with_inductor": "eager_rounding"}

    def keeps_bits(self, node: fx.Node) -> bool:
        """Whether a fused kernel computes `node` as eager execution does."""
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            return False
        if node.target in MOVES:
            return True
        values = [x.meta["val"] for x in (node, *node.all_input_nodes)]
        if not all(isinstance(x, torch.Tensor) for x in values):
            return False
        if len({(x.dtype, x.device) for x in values}) > 1:
            return False
        if not values[0].is_floating_point():
            return False
        if node.target in ARITHMETIC:
            return not node.kwargs  # such as alpha, a second operation
        return _function_name(node) in self.functions

    def uuid(self) -> str:
        source = inspect.getsource(sys.modules[__name__])
        return self.hash_source(source, str(sorted(self.functions)))


def _function_name(node: fx.Node) -> str:
    assert isinstance(node.target, OpOverload)
    name = node.target.__name__.partition(".")[0]
    return "_".join([name, *map(str, node.args[1:]), *map(str, node.kwargs.values())])


def _lowerable(node: fx.Node) -> Iterator[fx.Node]:
    """`node`, or the nodes that replace it here if Inductor has no lowering of it."""
    if node.target in lowerings:
        yield node
        return
    target, tensors = node.target, node.all_input_nodes
    assert isinstance(target, OpOverload)

    def call(*values: torch.Tensor) -> Any:
        replaced = dict(zip(tensors, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), replaced.__getitem__)
        return target(*args, **kwargs)

    traced = make_fx(call, select_decomp_table())(*(x.meta["val"] for x in tensors))
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True))
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(traced.graph, copies)
    assert isinstance(result, fx.Node)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    yield from (copy for copy in copies.values() if copy not in tensors)


def options_for(dtype: torch.dtype, device_type: str) -> dict[str, Any]:
    """Inductor's options for a model of this dtype on such a device."""
    functions = functions_of_equal_bits(dtype, device_type)
    return OPTIONS | {"post_grad_custom_post_pass": EagerRoundingPass(functions)}
