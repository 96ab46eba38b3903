# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A routed forward as a graph of operators, which torch.compile takes.

A module's calls are routed by a mode and by hooks that count, and no compiler keeps
these. So the forward is run once with a symbol for the number of tokens, and what it
does is kept: its operators, attention by vLLM's layers, and vLLM's positions.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from vllm.logger import init_logger

from .merged_products import merge_products

logger = init_logger(__name__)

# Of the run. Not a number that an axis of a module is likely to have.
TOKENS = 37

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class UnrecordableError(RuntimeError):
    """A forward does something else for other numbers of tokens."""


def example(like: torch.Tensor, axis: int) -> torch.Tensor:
    """As `like`, with `TOKENS` along `axis`: zeros, or numbers in order if it is -1."""
    shape = list(like.shape)
    shape[axis] = TOKENS
    if axis == 0:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    positions = torch.arange(TOKENS, dtype=like.dtype, device=like.device)
    return positions.expand(shape).contiguous()


def record(
    forward: Forward, inputs: torch.Tensor, positions: torch.Tensor, most_tokens: int
) -> fx.GraphModule:
    """The graph of `forward`, for any number of tokens.

    It has the module's tensors themselves, so that it computes with their values.
    Linear layers that share an input are one product, if `lay_side_by_side` was called.

    Args:
        forward: Takes `inputs` and `positions`. Its control flow may not depend on
            values.
        inputs: Token ids `[TOKENS]`, or embeddings `[TOKENS, hidden]`.
        positions: `[TOKENS]`, or `[axes, TOKENS]`.
        most_tokens: Of a step.

    Raises:
        UnrecordableError: What it does holds for some numbers of tokens only.

    """
    graph = _trace(forward, inputs, positions)
    _check_any_number(graph, most_tokens)
    merged = merge_products(graph)
    if merged is None:
        return graph
    try:
        merged = _trace(merged, inputs, positions)
        _check_any_number(merged, most_tokens)
    except (RuntimeError, ValueError) as error:  # of a view that cannot be
        logger.debug("Products of equal inputs are not merged: %s", error)
        return graph
    return merged


def _trace(
    forward: Forward, inputs: torch.Tensor, positions: torch.Tensor
) -> fx.GraphModule:
    # Before dispatch, so that composite operators stay whole, as where Dynamo traces.
    return make_fx(
        lambda inputs, positions: forward(inputs, positions),
        tracing_mode="symbolic",
        pre_dispatch=True,
        _allow_non_fake_inputs=True,
    )(inputs, positions)


def _check_any_number(graph: fx.GraphModule, most_tokens: int) -> None:
    """Check that no question was asked that other numbers of tokens answer otherwise.

    Raises:
        UnrecordableError: One was.

    """
    assert graph.shape_env is not None  # the tracing is symbolic
    for guard in graph.shape_env.guards:
        # The sizes of parameters are numbers, so each symbol is a number of tokens.
        symbols = guard.expr.free_symbols
        for tokens in range(2, most_tokens + 1):
            if not guard.expr.subs(dict.fromkeys(symbols, tokens)):
                raise UnrecordableError(
                    f"it asks whether {guard.expr}, which is true for {TOKENS} tokens "
                    f"and false for {tokens}"
                )


def digest(graph: fx.GraphModule) -> str:
    """Of all that compiled code of `graph` depends on: not the values of tensors.

    Equal modules have the same one in every process. If an argument cannot be written
    as text, it is unique.
    """
    if " object at 0x" in graph.code:
        return uuid.uuid4().hex
    found = hashlib.sha256(graph.code.encode())
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr(graph, node.target)
        about = (tensor.dtype, tensor.device.type, tensor.shape, tensor.stride())
        found.update(f"{node.target}: {about}\n".encode())
    return found.hexdigest()
