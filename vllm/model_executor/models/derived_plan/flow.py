# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which layers take what others give, seen in a forward without its weights' memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from vllm.model_executor.models.adapter.readers import READERS
from vllm.model_executor.models.plans.tensor import PLAIN, calls_embedding

# Where values come from, beside a layer by its name.
ATTENTION, OTHER, OUTPUT = "attention call ", "other: ", "output: "


def is_layer(source: str) -> bool:
    """Whether a source of values is a linear layer, by its name."""
    return not source.startswith((ATTENTION, OTHER, OUTPUT))


@dataclass(frozen=True)
class Attention:
    """An attention call, with the sources of what it is given."""

    query: frozenset[str]
    key: frozenset[str]
    value: frozenset[str]
    heads: int
    head_dim: int
    value_dim: int


@dataclass
class Flow:
    """What is seen in a forward.

    Args:
        vocab_size: Of the tokens.
        linears: The plain linear layers that are called, in order.
        inputs: The sources of their inputs.
        attention: Its calls, in order.
        others: Layers that are no linear layers, and why they are not divided.
        halved: Layers whose output is cut in two.
        embedding: The plain embedding of the tokens.
        tied: Linear layers that share the embedding's weight.

    """

    vocab_size: int
    linears: dict[str, nn.Linear] = field(default_factory=dict)
    inputs: dict[str, frozenset[str]] = field(default_factory=dict)
    attention: list[Attention] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    halved: set[str] = field(default_factory=set)
    embedding: str | None = None
    embedding_layer: nn.Embedding | None = None
    tied: set[str] = field(default_factory=set)
    _takers: dict[str, set[str]] = field(default_factory=dict)

    def takers(self, source: str) -> set[str]:
        """Who takes what `source` gives."""
        return self._takers.get(source, set())

    def take(self, taker: str, sources: frozenset[str]) -> None:
        for source in sources:
            self._takers.setdefault(source, set()).add(taker)


def values_of(name: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """The same values for a parameter of this name and shape, on every rank."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    numbers = torch.randn(65537, generator=generator, dtype=torch.float32, device="cpu")
    width = shape[-1] if len(shape) > 1 else 4
    numbers = (numbers / max(width, 1) ** 0.5).to(like)
    repeats = -(-shape.numel() // len(numbers))
    return numbers.repeat(repeats)[: shape.numel()].view(shape)


class Watch(TorchFunctionMode):
    """Gives parameters their values for the length of a call, and notes the calls.

    Args:
        module: Its parameters get no memory: each becomes one number, expanded. So it
            is to be a copy.
        device: Of those numbers.
        make: The values of a parameter, by its name.
        flow: Where to note what is seen.

    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        make: Callable[[str], torch.Tensor],
        flow: Flow | None = None,
    ) -> None:
        super().__init__()
        self.heads: list[tuple[int, int, int]] = []
        self._module = module
        self._make = make
        self._flow = flow
        self._sources = WeakIdKeyDictionary()
        self._names: dict[int, list[str]] = {}
        self._stand_ins: dict[int, nn.Parameter] = {}
        found: dict[int, nn.Parameter] = {}
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) not in found:
                number = torch.zeros((), dtype=parameter.dtype, device=device)
                stand_in = nn.Parameter(number.expand(parameter.shape), False)
                found[id(parameter)] = stand_in
                self._stand_ins[id(stand_in)] = stand_in
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = found[id(parameter)]
            self._names.setdefault(id(found[id(parameter)]), []).append(name)

    def mark_tokens(self, input_ids: torch.Tensor) -> None:
        self._tokens = input_ids

    def finish(self, output: torch.Tensor) -> None:
        """Note what the module's result was made of."""
        assert self._flow is not None
        self._flow.take(OUTPUT, self._sources_of([output]))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, torch.Tensor):
                return result
        if func in READERS:
            call = READERS[func](*args, **kwargs)
            self.heads.append(
                (call.query.shape[1], call.query.shape[-1], call.value.shape[-1])
            )
        real_args, real_kwargs = tree_map(self._with_values, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        if self._flow is not None:
            self._note(self._flow, func, args, kwargs, result)
        return result

    def _with_values(self, value: Any) -> Any:
        names = self._names.get(id(value)) if isinstance(value, nn.Parameter) else None
        return value if names is None else self._make(names[0])

    def _sources_of(self, tensors: list[Any]) -> frozenset[str]:
        return frozenset().union(*(self._sources.get(t, ()) for t in tensors))

    def _note(self, flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        weights = [t for t in given if id(t) in self._names]
        sources = self._sources_of([t for t in given if id(t) not in self._names])
        if func is F.linear and weights and weights[0] is args[1]:
            gives: frozenset[str] | set[str] = self._linear(flow, weights[0], sources)
        elif func is F.embedding:
            gives = self._embedding(flow, args, kwargs)
        elif func in READERS:
            gives = self._attention(flow, READERS[func](*args, **kwargs))
        else:
            gives = sources | self._other(flow, func, weights, sources)
            chunks = args[1] if len(args) > 1 else kwargs.get("chunks")
            if func in (torch.chunk, torch.Tensor.chunk) and chunks == 2:
                flow.halved |= sources
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._sources[tensor] = frozenset(gives)

    def _linear(
        self, flow: Flow, weight: torch.Tensor, sources: frozenset[str]
    ) -> set[str]:
        path = self._path_of(flow, weight)
        part = self._module.get_submodule(path)
        if not isinstance(part, nn.Linear) or type(part).forward not in PLAIN:
            flow.others[path] = f"a {type(part).__name__} is no nn.Linear"
            flow.take(OTHER + path, sources)
            return {OTHER + path}
        flow.linears[path] = part
        flow.inputs[path] = flow.inputs.get(path, frozenset()) | sources
        flow.take(path, sources)
        return {path}

    def _path_of(self, flow: Flow, weight: torch.Tensor) -> str:
        """The layer that is called with this weight, of those that share it."""
        paths = [name.rpartition(".")[0] for name in self._names[id(weight)]]
        for path in paths:
            if isinstance(self._module.get_submodule(path), nn.Linear):
                if len(paths) > 1:
                    flow.tied.add(path)
                return path
        return paths[0]

    def _embedding(self, flow: Flow, args: Any, kwargs: Any) -> set[str]:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        ids = args[0] if args else kwargs["input"]
        if id(weight) not in self._names:
            return {f"{OTHER}an embedding"}
        paths = [name.rpartition(".")[0] for name in self._names[id(weight)]]
        for path in paths:
            part = self._module.get_submodule(path)
            if not isinstance(part, nn.Embedding):
                continue
            plain = type(part).forward is nn.Embedding.forward or calls_embedding(part)
            whole = part.num_embeddings >= flow.vocab_size
            if plain and whole and torch.equal(ids.flatten(), self._tokens):
                flow.embedding, flow.embedding_layer = path, part
            flow.others.setdefault(path, "an embedding")
        return {f"{OTHER}{paths[0]}"}

    def _attention(self, flow: Flow, call: Any) -> set[str]:
        parts = [self._sources_of([t]) for t in (call.query, call.key, call.value)]
        this = f"{ATTENTION}{len(flow.attention)}"
        for part in parts:
            flow.take(this, part)
        sizes = (call.query.shape[1], call.query.shape[-1], call.value.shape[-1])
        query, key, value = parts
        flow.attention.append(Attention(query, key, value, *sizes))
        return {this}

    def _other(
        self, flow: Flow, func: Any, weights: list[Any], sources: frozenset[str]
    ) -> set[str]:
        """What else its result is made of, by which it cannot be divided."""
        gives = set()
        for weight in weights:
            name = self._names[id(weight)][0]
            path = name.rpartition(".")[0]
            if weight.dim() > 1:
                part = self._module.get_submodule(path)
                what = "is no nn.Linear or nn.Embedding"
                flow.others[path] = f"a {type(part).__name__} {what}"
                gives.add(OTHER + path)
            elif any(
                is_layer(source)
                and flow.linears[source].out_features == weight.shape[-1]
                for source in sources
            ):
                gives.add(OTHER + path)
        return gives
