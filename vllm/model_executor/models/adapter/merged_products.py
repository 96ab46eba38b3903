# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linear layers that share an input, computed as one product, as vLLM's own models do.

`q_proj`, `k_proj` and `v_proj` of a user's module stay three parameters with their
names. They only lie one after another in memory, so that the graph of a recording may
take them for one matrix.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

LINEAR = torch.ops.aten.linear.default
ALIGNMENT = 16  # bytes, which matrix products want of the first row


def lay_side_by_side(module: nn.Module) -> None:
    """Give sibling linear layers of equal inputs neighbouring memory, with the values.

    Whether they do share an input is seen in the graph. Parameters stay the objects
    that they are, and each is contiguous.
    """
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    users = Counter(_storage(tensor) for _, tensor in named if not tensor.is_meta)
    for part in module.modules():
        siblings = defaultdict(list)
        for child in part.children():
            if isinstance(child, nn.Linear) and _may_move(child, users):
                weight, bias = child.weight, child.bias
                key = (weight.shape[1], weight.dtype, weight.device, bias is None)
                siblings[key].append(child)
        for layers in siblings.values():
            if len(layers) > 1:
                _move([layer.weight for layer in layers])
                if layers[0].bias is not None:
                    _move([layer.bias for layer in layers])


def _may_move(layer: nn.Linear, users: Counter[int]) -> bool:
    return all(
        type(parameter) is nn.Parameter
        and not parameter.is_meta
        and parameter.is_contiguous()
        and parameter.untyped_storage().nbytes() == parameter.nbytes
        and users[_storage(parameter)] == 1
        and parameter.nbytes % ALIGNMENT == 0
        for parameter in layer.parameters(recurse=False)
    )


def _move(parameters: Sequence[torch.Tensor]) -> None:
    whole = torch.cat([parameter.detach() for parameter in parameters])
    rows = [len(parameter) for parameter in parameters]
    for parameter, room in zip(parameters, whole.split(rows), strict=True):
        parameter.data = room


def merge_products(graph: fx.GraphModule) -> fx.GraphModule | None:
    """A graph that computes neighbouring products of one input at once.

    None if there are no such products, or if something between them writes to memory,
    which may be the input's. Results are parts of one tensor. A module that looks at
    their memory, as by `view(-1)`, may not be able to run with that.
    """
    merged = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    products: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in merged.graph.find_nodes(op="call_function", target=LINEAR):
        x, *parameters = node.all_input_nodes
        if parameters and all(argument.op == "get_attr" for argument in parameters):
            products[x].append(node)
    number = 0
    for of_input in products.values():
        for neighbours in _neighbours(merged, of_input):
            between = _in_order(merged, neighbours)
            if not any(node.is_impure() for node in between):
                _merge(merged, between[0], neighbours, f"_merged{number}")
                number += 1
    if not number:
        return None
    merged.graph.lint()
    merged.recompile()
    return merged


def _in_order(graph: fx.GraphModule, products: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes from the first of `products` to the last one."""
    nodes = list(graph.graph.nodes)
    places = [nodes.index(node) for node in products]
    return nodes[min(places) : max(places) + 1]


def _neighbours(
    graph: fx.GraphModule, products: Sequence[fx.Node]
) -> Iterator[list[fx.Node]]:
    """Of the products of one input, those whose weights lie one after another."""
    first = {_tensors(graph, node)[0].data_ptr(): node for node in products}
    found: list[fx.Node] = []
    for _, node in sorted(first.items()):
        if found and not _is_next(_tensors(graph, found[-1]), _tensors(graph, node)):
            if len(found) > 1:
                yield found
            found = []
        found.append(node)
    if len(found) > 1:
        yield found


def _is_next(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.dtype == b.dtype
        and a.shape[1:] == b.shape[1:]
        and a.is_contiguous()
        and b.is_contiguous()
        and _storage(a) == _storage(b)
        and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in zip(before, after, strict=True)
    )


def _merge(
    graph: fx.GraphModule, first: fx.Node, products: Sequence[fx.Node], name: str
) -> None:
    """Put one product before `first`, and its parts in the places of `products`."""
    tensors = [_tensors(graph, node) for node in products]
    rows = [len(weight) for weight, *_ in tensors]
    names = [f"{name}_weight", f"{name}_bias"][: len(tensors[0])]
    for own, part in zip(names, tensors[0], strict=True):
        shape = (sum(rows), *part.shape[1:])
        whole = part.detach().as_strided(shape, part.stride())
        graph.register_buffer(own, whole, persistent=False)
    x = first.all_input_nodes[0]
    with graph.graph.inserting_before(first):
        wholes = [graph.graph.get_attr(own) for own in names]
        product = graph.graph.call_function(LINEAR, (x, *wholes))
        split = torch.ops.aten.split_with_sizes.default
        parts = graph.graph.call_function(split, (product, rows, -1))
        for index, node in enumerate(products):
            result = graph.graph.call_function(operator.getitem, (parts, index))
            node.replace_all_uses_with(result)
    for node in products:
        parameters = node.all_input_nodes[1:]
        graph.graph.erase_node(node)
        for parameter in parameters:
            if not parameter.users:
                graph.graph.erase_node(parameter)


def _tensors(graph: fx.GraphModule, product: fx.Node) -> list[torch.Tensor]:
    """Weight `[outputs, inputs]`, and bias `[outputs]` if there is one."""
    return [getattr(graph, str(node.target)) for node in product.all_input_nodes[1:]]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
