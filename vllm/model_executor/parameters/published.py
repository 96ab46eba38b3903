# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints under the names that Transformers' `save_pretrained` publishes.

Transformers writes some models under other names than their own, and some of their
tensors in parts, such as the weights of each expert. A table of conversions says which.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Merge:
    """Tensors of a checkpoint of which Transformers makes one or several of a module.

    Args:
        targets: The names of those.
        numel: How many elements they have together.
        parts: What has come, by its published name: the pattern that its name fits,
            and the tensor.

    """

    targets: tuple[str, ...]
    numel: int
    parts: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    _kept: set[str] = field(default_factory=set)

    def came(self) -> int:
        """How many elements have come."""
        return sum(tensor.numel() for _, tensor in self.parts.values())

    def keep(self) -> None:
        """Copy what has come, because a caller may write over it after a call."""
        for name in self.parts.keys() - self._kept:
            pattern, tensor = self.parts[name]
            self.parts[name] = pattern, tensor.clone()
        self._kept |= self.parts.keys()

    def __str__(self) -> str:
        return (
            f"{self.came()} of {self.numel} elements of {', '.join(self.targets)}, in "
            "parts that Transformers merges"
        )


class PublishedNames:
    """What becomes of published names.

    Args:
        module: What is loaded. Parts of it that are Transformers' have such names.
        here: The module's own names that this rank has.
        shapes: By the own names of all ranks; None if one is not known.

    """

    def __init__(
        self,
        module: nn.Module,
        here: Collection[str],
        shapes: Mapping[str, torch.Size | None],
    ) -> None:
        self._here, self._shapes = here, shapes
        self._conversions: list[_Conversions] = []
        for prefix, part in module.named_modules():
            inside = any(prefix.startswith(one.prefix) for one in self._conversions)
            if isinstance(part, PreTrainedModel) and not inside:
                prefix = f"{prefix}." if prefix else ""
                self._conversions.append(_Conversions(prefix, part))

    def own(
        self, weights: Weights, merges: dict[str, Merge], complete: bool, source: str
    ) -> Weights:
        """`weights` under the module's own names, which stay.

        One tensor at a time, so that a part of a checkpoint may come.

        Args:
            weights: Pairs of name and tensor. A collection stays one.
            merges: Of which parts have come, by the first target. Those that become
                complete are taken out, and new ones are put in.
            complete: Whether no merge may be left.
            source: Where the weights come from, for messages.

        Raises:
            ValueError: more has come than a merge takes, or one is left.

        """
        if not self._conversions:
            return weights
        named = self._named(weights, merges, complete, source)
        return list(named) if isinstance(weights, Collection) else named

    def _named(
        self, weights: Weights, merges: dict[str, Merge], complete: bool, source: str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        shapes = self._shapes
        for name, tensor in weights:
            found = None if name in shapes else self._find(name)
            if found is None:
                yield name, tensor
                continue
            conversions, own, pattern = found
            if pattern is None or own not in shapes:
                yield (own if own in shapes else name), tensor
                continue
            merge = merges.get(own)
            if merge is None:
                targets = conversions.targets(own, pattern)
                sizes = [shapes.get(target) for target in targets]
                if None in sizes:  # another release's, or not a part of this module
                    yield name, tensor
                    continue
                numel = sum(size.numel() for size in sizes if size is not None)
                merge = merges[own] = Merge(targets, numel)
            merge.parts[name] = pattern, tensor
            if merge.came() > merge.numel:
                raise ValueError(
                    f"{source} has {name} and others, {merge.came()} elements, of "
                    f"which Transformers makes {', '.join(merge.targets)}; expected "
                    f"{merge.numel}. Use a checkpoint of the same config."
                )
            if merge.came() < merge.numel:
                continue
            del merges[own]
            if any(target in self._here for target in merge.targets):
                yield from conversions.merged(merge)
                continue
            # Other ranks have them, and this one only looks at their shapes.
            for target in merge.targets:
                yield target, torch.empty(shapes[target] or (), device="meta")
        for merge in merges.values() if complete else ():
            raise ValueError(f"{source} has {merge}. Use a whole checkpoint.")

    def _find(self, name: str) -> tuple[_Conversions, str, str | None] | None:
        for conversions in self._conversions:
            if name.startswith(conversions.prefix):
                return conversions, *conversions.rename(name)
        return None


class _Conversions:
    """Transformers' table for one of its models, which is called `prefix` in a module.

    It is read when a name is first looked up, because a trainer may bring its tensors
    in a call each, under the module's own names.
    """

    def __init__(self, prefix: str, module: PreTrainedModel) -> None:
        self.prefix = prefix
        self._module = module
        self._tables: tuple[list[Any], list[Any]] | None = None

    def rename(self, name: str) -> tuple[str, str | None]:
        """A name's own one, and the pattern by which it is a part of a merge."""
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:  # older releases of Transformers have no such table
            return name, None
        own, pattern = rename_source_key(name.removeprefix(self.prefix), *self._table())
        return self.prefix + own, pattern

    def targets(self, own: str, pattern: str) -> tuple[str, ...]:
        """All that the parts become of which the first is called `own`."""
        first, *others = self._converter(pattern).target_patterns
        return own, *(own.replace(first, other, 1) for other in others)

    def merged(self, merge: Merge) -> Iterator[tuple[str, torch.Tensor]]:
        """The module's own tensors, by Transformers' operations."""
        from transformers.core_model_loading import dot_natural_key

        first = merge.targets[0].removeprefix(self.prefix)
        # Expert 10 comes after expert 2.
        parts = sorted(merge.parts.items(), key=lambda part: dot_natural_key(part[0]))
        for name, (pattern, tensor) in parts:
            converter = self._converter(pattern)
            converter.add_tensor(first, name, pattern, tensor)
        made = converter.convert(first, self._module, self._module.config)
        for name, tensor in made.items():
            yield self.prefix + name, tensor[0] if isinstance(tensor, list) else tensor

    def _converter(self, pattern: str) -> Any:
        _, converters = self._table()
        return next(one for one in converters if pattern in one.source_patterns)

    def _table(self) -> tuple[list[Any], list[Any]]:
        """Renamings and converters."""
        if self._tables is None:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

            # Transforms note what they did, and may be shared by all models of a type.
            table = copy.deepcopy(get_model_conversion_mapping(self._module))
            self._tables = (
                [one for one in table if isinstance(one, WeightRenaming)],
                [one for one in table if isinstance(one, WeightConverter)],
            )
        return self._tables
