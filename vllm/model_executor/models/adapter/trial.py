# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a module's forward does, seen in a trial on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.parameters.layout import MARK

from .calls import AttentionCall, UnservableError, attend_to_self, name_of_function
from .flex import resolved
from .masks import UnknownMaskError, window_of
from .readers import OTHERS, READERS
from .sites import Running, Site, line_of_model
from .stand_ins import unseen_caller
from .tables import Tables, sliced_axis
from .written_out import PRODUCT, PRODUCTS, WrittenOut

# Marks of values that are computed from the tokens, or from given positions.
TOKENS, POSITIONS = "tokens", "positions"
# They write into their first argument, and return nothing.
_WRITES = (torch.Tensor.__setitem__, torch.Tensor.data.__set__)  # type: ignore[attr-defined]
_UNDEFINED = (torch.empty, torch.empty_strided)  # say nothing until they are written
_SELECTS = (torch.Tensor.__getitem__, torch.narrow, torch.select, torch.Tensor.select)


@dataclass(frozen=True)
class SeenAttention:
    """An attention call of the trial."""

    heads: int
    kv_heads: int
    repeats: int  # how often each key and value head was repeated before the call
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None = field(compare=False)
    line: str = field(compare=False)
    scores: Site | None = None  # the first product, if it is written out


@dataclass(frozen=True)
class Origin:
    """Where values come from that depend on a token's index in the call.

    Args:
        site: The call that makes them.
        kind: "arange", "slice" of a table along an axis, or "other".
        start: The first value of an arange.
        step: The difference of its neighbours.
        dtype: Of its values.
        axis: Of the table.
        line: Of the model's code.

    """

    site: Site
    kind: str
    start: float = 0
    step: float = 1
    dtype: torch.dtype | None = None
    axis: int = 0
    line: str = field(default="", compare=False)


@dataclass
class HeadCall:
    """A product with a matrix that is as wide as the vocabulary, and what follows.

    Args:
        site: Of the product.
        hidden_states: Those of all tokens, its input or what that was taken from.
        arguments: The matrix and bias.
        output: Its output.
        selected: Where its input was taken from all tokens' hidden states, if it was.
        tail: Later calls with what it leads to, as function, arguments, keywords and
            result.

    """

    site: Site
    hidden_states: torch.Tensor
    arguments: tuple[Any, ...]
    output: torch.Tensor
    selected: Site | None = None
    tail: list[tuple[Any, Any, Any, torch.Tensor]] = field(default_factory=list)


class Trial(TorchFunctionMode):
    """Watches one forward, and has each token attend to itself only.

    So every token's result depends on the token and its position alone, unless the
    module mixes tokens elsewhere.

    Args:
        forward: The forward, which the module's hooks are told of.
        tokens: Their number, a size that no parameter has.
        vocab_size: The least width of logits.
        tables: The module's tensors.

    """

    def __init__(
        self, forward: Running, tokens: int, vocab_size: int, tables: Tables
    ) -> None:
        super().__init__()
        self.attention: dict[Site, SeenAttention] = {}
        self.origins: dict[Site, Origin] = {}
        self.owners: set[str] = set()
        self.head: HeadCall | None = None
        self._forward = forward
        self._tokens = tokens
        self.vocab_size = vocab_size
        self._tables = tables
        # By tensor: the origins of what it was computed from, and how it was selected.
        self._origins_of = WeakIdKeyDictionary()
        self._selected = WeakIdKeyDictionary()
        self._written = WrittenOut(tokens)

    def mark(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Tell what the arguments of the module's forward are."""
        self._origins_of[input_ids] = frozenset([TOKENS])
        self._origins_of[positions] = frozenset([POSITIONS])

    def origins_of(self, tensor: torch.Tensor) -> frozenset[Any]:
        return self._origins_of.get(tensor, frozenset())

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        hidden = unseen_caller()
        if func in OTHERS or hidden is not None:
            raise UnservableError(
                f"{OTHERS.get(func, hidden)} attends inside, at {line_of_model()}; use "
                "F.scaled_dot_product_attention, or TrainableAttention"
            )
        if func in READERS:
            call = READERS[func](*args, **kwargs)
            caller = self._at(name_of_function(func))
            return self._attend(caller, call, _tensors((args, kwargs)))
        site = self._site(func, args)
        if written := self._written.weights(func, args):
            assert site is not None
            scores, product = written
            given = [*scores.first.operands, product.operands[1]]
            return self._attend(site, scores.attend(product), given, scores.site)
        result = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        origins: frozenset[Any] = frozenset().union(*map(self.origins_of, given))
        results = _tensors(result)
        if result is None and given and func in _WRITES:
            results = given[:1]
        for tensor in results:
            self._set_origins(func, site, args, tensor, origins)
        if TOKENS in origins:
            self._written.follow(func, site, args, kwargs, results)
        if TOKENS in origins and len(results) == 1:
            if site is not None and func in _SELECTS:
                self._selected[results[0]] = (site, given[0])
            self._follow_head(func, site, args, kwargs, results[0])
        return result

    def _site(self, func: Any, args: Any) -> Site | None:
        """The site of a call that may be replaced when the module is served."""
        if func is torch.arange:
            return self._at("arange")
        if func in PRODUCTS:
            return self._at(PRODUCT)
        if func is torch.Tensor.__getitem__:
            name = self._tables.name_of(args[0])
            if name is not None:
                return self._at(f"slice of {name}")
            if self._rows(args[0]) == self._tokens:
                return self._at("selection")
        if func is F.linear and len(args) > 1 and self._is_head(args[1]):
            name = self._tables.name_of(args[1])
            if name is not None:
                return self._at(f"linear of {name}")
        return None

    def _is_head(self, weight: torch.Tensor) -> bool:
        """Whether it is as wide as the vocabulary, or as this rank's part of it."""
        ranks = 1
        if getattr(weight, MARK, False):
            ranks = get_tensor_model_parallel_world_size()
        return len(weight) * ranks >= self.vocab_size

    def _at(self, function: str) -> Site:
        site = self._forward.site(function)
        self.owners.add(site.path)
        return site

    def _set_origins(
        self,
        func: Any,
        site: Site | None,
        args: Any,
        tensor: torch.Tensor,
        origins: frozenset[Any],
    ) -> None:
        known = bool(origins)
        if not known and func not in _UNDEFINED and self._varies(tensor):
            origin = self._origin(func, site, args, tensor)
            self.origins[origin.site] = origin
            origins = frozenset([origin.site])
        if origins:
            self._origins_of[tensor] = origins | self.origins_of(tensor)

    def _origin(
        self, func: Any, site: Site | None, args: Any, tensor: torch.Tensor
    ) -> Origin:
        line = line_of_model()
        if site is None:
            site = Site(self._forward.path, name_of_function(func), len(self.origins))
        elif func is torch.arange:
            values = tensor.tolist()
            start, step = values[0], values[1] - values[0]
            return Origin(site, "arange", start, step, tensor.dtype, line=line)
        else:
            axis = sliced_axis(args[0], args[1], self._tokens)
            if axis is not None:
                return Origin(site, "slice", axis=axis, line=line)
        return Origin(site, "other", line=line)

    def _varies(self, tensor: torch.Tensor) -> bool:
        """Whether it differs from token to token."""
        for axis, size in enumerate(tensor.shape):
            if size == self._tokens:
                first = tensor.narrow(axis, 0, 1)
                if not torch.equal(tensor, first.expand_as(tensor)):
                    return True
        return False

    def _attend(
        self,
        site: Site,
        call: AttentionCall,
        given: list[torch.Tensor],
        scores: Site | None = None,
    ) -> Any:
        self.attention[site] = replace(self._seen(site, call), scores=scores)
        out = attend_to_self(call)
        if scores is None:
            # A reader makes views of what was given, such as transposed ones.
            attended = {_memory(x) for x in (call.query, call.key, call.value)}
            given = [x for x in given if _memory(x) in attended]
        sources = [self.origins_of(x) for x in given]
        result = call.result(out)
        for tensor in _tensors(result):
            self._origins_of[tensor] = frozenset().union(*sources)
        return result

    def _seen(self, site: Site, call: AttentionCall) -> SeenAttention:
        line = line_of_model()
        call = resolved(call)
        if call.unservable is not None:
            raise UnservableError(
                f"{site} cannot be served: {call.unservable}, at {line}"
            )
        documents = call.cu_seqlens
        if documents is not None and documents.tolist() != [0, self._tokens]:
            raise UnservableError(
                f"{site} attends within the documents {documents.tolist()} where the "
                f"module has one sequence of {self._tokens} tokens, at {line}"
            )
        q, k, v = call.query, call.key, call.value
        batch, heads, queries, head_dim = q.shape
        keys = k.shape[-2]
        if batch != 1 or queries != self._tokens or keys != self._tokens:
            raise UnservableError(
                f"{site} attends from {queries} queries to {keys} keys in {batch} "
                f"sequences where the module has one of {self._tokens} tokens, at "
                f"{line}; expected each token as one query and one key"
            )
        try:
            window = window_of(call.mask, call.causal, self._tokens)
        except UnknownMaskError as error:
            raise UnservableError(f"{site} cannot be served: {error}, at {line}") from (
                None
            )
        if call.window is not None:
            if window is not None and window != call.window:
                raise UnservableError(
                    f"{site} asks for a window of {call.window} keys, but its mask has "
                    f"one of {window}, at {line}"
                )
            window = call.window
        repeats = repeats_of(k, v)
        return SeenAttention(
            heads=heads,
            kv_heads=k.shape[1] // repeats,
            repeats=repeats,
            head_dim=head_dim,
            value_dim=v.shape[-1],
            scale=float(call.scale),
            window=window,
            soft_cap=call.soft_cap,
            sinks=call.sinks,
            line=line,
        )

    def _rows(self, tensor: torch.Tensor) -> int | None:
        """Tokens of hidden states, `[tokens, hidden]` or `[1, tokens, hidden]`."""
        if not isinstance(tensor, torch.Tensor) or tensor.dim() not in (2, 3):
            return None
        return tensor.shape[-2]

    def _follow_head(
        self, func: Any, site: Site | None, args: Any, kwargs: Any, result: torch.Tensor
    ) -> None:
        """Note the last product that is as wide as the vocabulary, and what follows."""
        if func is F.linear and site is not None:
            selected, source = self._selected.get(args[0], (None, args[0]))
            if self._rows(args[0]) == self._tokens:
                selected, source = None, args[0]
            self.head = HeadCall(site, source, args[1:], result, selected)
        elif self.head is not None:
            made = {id(self.head.output), *(id(call[3]) for call in self.head.tail)}
            if any(id(leaf) in made for leaf in tree_leaves((args, kwargs))):
                self.head.tail.append((func, args, kwargs, result))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def repeats_of(key: torch.Tensor, value: torch.Tensor) -> int:
    """How often each head of keys and values stands beside itself.

    Args:
        key: `[batch, heads, tokens, head_dim]`.
        value: `[batch, heads, tokens, value_dim]`.

    """
    heads = key.shape[1]
    # Where all values are one number, heads that differ once there are weights look
    # equal now.
    if bool((key == key.flatten()[0]).all()) or bool(key.isnan().any()):
        return 1
    for repeats in range(heads, 1, -1):
        if heads % repeats == 0 and all(
            torch.equal(x, x[:, ::repeats].repeat_interleave(repeats, dim=1))
            for x in (key, value)
        ):
            return repeats
    return 1
