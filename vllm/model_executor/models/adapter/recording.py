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
from collections.abc import Callable, Iterable
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from vllm.logger import init_logger

from .merged_products import merge_products
from .sites import line_of_model

logger = init_logger(__name__)

# Of the run. Not a number that an axis of a module is likely to have.
TOKENS = 37
# Of a forward, for numbers of tokens to which it may do something else.
MOST_TRACES = 8

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class UnrecordableError(RuntimeError):
    """A forward does something that a graph does not say of each number of tokens."""


class _NoNewData(TorchFunctionMode):
    """Refuses `tensor.data = other`, which no graph keeps."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise UnrecordableError(f"it sets a tensor's data, at {line_of_model()}")
        return func(*args, **(kwargs or {}))


def example(like: torch.Tensor, axis: int, tokens: int = TOKENS) -> torch.Tensor:
    """As `like`, with `tokens` along `axis`: zeros, or numbers in order if it is -1."""
    shape = list(like.shape)
    shape[axis] = tokens
    if axis == 0:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    positions = torch.arange(tokens, dtype=like.dtype, device=like.device)
    return positions.expand(shape).contiguous()


def record(
    forward: Forward,
    inputs: torch.Tensor,
    positions: torch.Tensor,
    longest: int,
    most_tokens: int,
) -> fx.GraphModule:
    """The graph of `forward`, for any number of tokens.

    It has the module's tensors themselves, so that it computes with their values.
    Linear layers that share an input are one product, if `lay_side_by_side` was called.

    Args:
        forward: Takes `inputs` and `positions`. Its control flow may not depend on
            values.
        inputs: Token ids `[TOKENS]`, or embeddings `[TOKENS, hidden]`.
        positions: `[TOKENS]`, or `[axes, TOKENS]`.
        longest: The most tokens of one sequence.
        most_tokens: Of a step, which has tokens of several sequences.

    Raises:
        UnrecordableError: What it does holds for some numbers of tokens only, or sets
            the data of a tensor.

    """
    graph = _trace(forward, inputs, positions)
    # The module was written for one sequence, so what it asks is about its length.
    _check_lengths(graph, forward, inputs, positions, longest)
    # The next trace runs this graph and not the module, so only operators ask there.
    # What they need has to hold for a whole step.
    merged = merge_products(graph)
    if merged is not None:
        try:
            return _trace_steps(merged, inputs, positions, most_tokens)
        except (RuntimeError, ValueError) as error:  # of a view that cannot be
            logger.debug("Products of equal inputs are not merged: %s", error)
    return _trace_steps(graph, inputs, positions, most_tokens)


def _trace(
    forward: Forward,
    inputs: torch.Tensor,
    positions: torch.Tensor,
    mode: Literal["symbolic", "fake"] = "symbolic",
) -> fx.GraphModule:
    """The operators, with a symbol for the number of tokens, or by "fake" with it."""

    def traced(inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with _NoNewData():
            return forward(inputs, positions)

    # Before dispatch, so that composite operators stay whole, as where Dynamo traces.
    graph = make_fx(
        traced,
        tracing_mode=mode,
        pre_dispatch=True,
        _allow_non_fake_inputs=True,
    )(inputs, positions)
    # vLLM's layers take no masks, so the operators that made them are dead code now.
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _trace_steps(
    graph: fx.GraphModule,
    inputs: torch.Tensor,
    positions: torch.Tensor,
    most_tokens: int,
) -> fx.GraphModule:
    """`graph`, if it holds for steps of up to `most_tokens`.

    Raises:
        UnrecordableError: It does not.

    """
    graph = _trace(graph, inputs, positions)
    for tokens, question in _unlike(graph, range(2, most_tokens + 1)).items():
        raise _unrecordable(question, tokens)
    return graph


def _check_lengths(
    graph: fx.GraphModule,
    forward: Forward,
    inputs: torch.Tensor,
    positions: torch.Tensor,
    longest: int,
) -> None:
    """Check that `forward` does what `graph` does with up to `longest` tokens.

    Raises:
        UnrecordableError: It does something else.

    """
    pending = _unlike(graph, range(2, longest + 1))
    for _ in range(MOST_TRACES):
        if not pending:
            return
        # Another answer may lead to the same graph. A mask that is cut to the length
        # of a sequence asks whether that is all of it, for one.
        tokens, question = next(iter(pending.items()))
        given = example(inputs, 0, tokens), example(positions, -1, tokens)
        try:
            other = _trace(forward, *given)
            if _same(graph, other):
                pending = _unlike(other, pending)
                continue
            # The answer may also say how many tokens there are, and with that number
            # both graphs may be the same.
            other = _trace(forward, *given, mode="fake")
            equal = _same(_trace(graph, *given, mode="fake"), other)
        except Exception as error:
            raise _unrecordable(question, tokens) from error
        if not equal:
            break
        del pending[tokens]
    for tokens, question in pending.items():
        raise _unrecordable(question, tokens)


def _unlike(graph: fx.GraphModule, numbers: Iterable[int]) -> dict[int, sympy.Basic]:
    """The numbers of tokens for which a question has another answer than in the trace.

    Returns:
        The first such question, by the number of tokens.

    """
    assert graph.shape_env is not None  # the tracing is symbolic
    found: dict[int, sympy.Basic] = {}
    sizes = _other_sizes(graph)
    for guard in graph.shape_env.guards:
        question = guard.expr.xreplace(sizes)
        # The sizes of parameters are numbers, so each symbol is a number of tokens.
        symbols = sorted(question.free_symbols, key=str)
        functions = {type(f).__name__: type(f) for f in question.atoms(sympy.Function)}
        holds = sympy.lambdify(symbols, question, [functions])
        for tokens in numbers:
            if not holds(*[tokens] * len(symbols)):
                found.setdefault(tokens, question)
    return dict(sorted(found.items()))


def _other_sizes(graph: fx.GraphModule) -> dict[sympy.Basic, sympy.Integer]:
    """The values of symbols that are no numbers of tokens.

    The first axis of the first input is of tokens. Its others, the width of embeddings
    and the axes of positions, have symbols too, but do not change.
    """
    inputs, *others = (
        node.meta["val"].shape for node in graph.graph.find_nodes(op="placeholder")
    )
    if not isinstance(inputs[0], torch.SymInt):
        return {}  # a question has fixed the number of tokens
    sizes = [size for shape in (inputs[1:], *others) for size in shape]
    values = {
        size.node.expr: sympy.Integer(size.node.hint)
        for size in sizes
        if isinstance(size, torch.SymInt)
    }
    assert graph.shape_env is not None
    for guard in graph.shape_env.guards:
        if isinstance(guard.expr, sympy.Eq):  # it has made a size a number
            symbol, value = guard.expr.args
            if symbol.is_Symbol and value.is_Integer:
                values[symbol] = value
    values.pop(inputs[0].node.expr, None)
    return values


def _unrecordable(question: sympy.Basic, tokens: int) -> UnrecordableError:
    return UnrecordableError(
        f"it asks whether {question}, which is true for {TOKENS} tokens and false for "
        f"{tokens}"
    )


def _same(graph: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether both are the same operators on equal tensors."""
    if len(graph.graph.nodes) != len(other.graph.nodes):
        return False
    in_other: dict[fx.Node, fx.Node] = {}
    for mine, theirs in zip(graph.graph.nodes, other.graph.nodes, strict=True):
        in_other[mine] = theirs
        if mine.op != theirs.op:
            return False
        if mine.op == "get_attr":
            tensors = getattr(graph, mine.target), getattr(other, theirs.target)
            if not torch.equal(*tensors):
                return False
        elif mine.op == "call_function" and mine.target != theirs.target:
            return False
        arguments = fx.map_arg((mine.args, mine.kwargs), in_other.__getitem__)
        if arguments != (theirs.args, theirs.kwargs):
            return False
    return True


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
