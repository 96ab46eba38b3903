# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a served module's tensors are all of one update, however many loads it has.

An update is all loads between two steps of the engine: one call with everything, or one
for each tensor. What fails before anything has changed leaves the old weights; what
fails later leaves a mixture, until every tensor has been loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed import ProcessGroup

from vllm.distributed.text_collectives import all_gather_text
from vllm.model_executor.parameters.names import Entry, Place
from vllm.model_executor.parameters.published import Merge

LISTED = 8

Entries = Mapping[Place, Entry]


@dataclass
class Waiting:
    """The tensors of a layer that have come, by their places, of all its `entries`."""

    entries: Entries
    came: dict[Place, torch.Tensor] = field(default_factory=dict)

    def is_complete(self) -> bool:
        return len(self.came) == len(self.entries)

    def missing(self) -> list[str]:
        """The names of what has not come."""
        return [e.name for place, e in self.entries.items() if place not in self.came]


class UpdateState:
    """What this rank's loads have changed since the last step of the engine.

    Args:
        tensors: The names of each tensor that a checkpoint has to hold; several names
            if it is tied, or if only a module's own `load_state_dict` can fill it.

    """

    def __init__(self, tensors: list[frozenset[str]]) -> None:
        self._tensors = tensors
        self._new: set[str] = set()  # names loaded in this update
        self._error: str | None = None  # of a load of this update
        self._why: str | None = None  # a sentence: the weights cannot be served
        self._stale: list[frozenset[str]] = []  # to be loaded to end that
        # Layers that were begun, and pack their tensors when all have come.
        self._waiting: dict[nn.Module, Waiting] = {}
        # Of tensors that come under published names, by the first that is made.
        self.merges: dict[str, Merge] = {}
        self.touched = False  # since the last `end`

    def begin_load(self) -> None:
        self.touched = True
        if self.is_complete():  # what comes now is another update
            self._new.clear()

    def waiting(self, layer: nn.Module, entries: Callable[[], Entries]) -> Waiting:
        """What has come of a layer that packs all of `entries` at once."""
        if layer not in self._waiting:
            self._waiting[layer] = Waiting(entries())
        return self._waiting[layer]

    def end_waiting(self, layer: nn.Module) -> None:
        """All of a layer have come."""
        del self._waiting[layer]

    def finish_load(self, names: set[str]) -> None:
        self._new |= names
        self._stale = [tensor for tensor in self._stale if not tensor & names]
        if not self._stale:
            self._why = None

    def fail_load(self, error: BaseException, written: set[str] | None) -> None:
        """A load failed after it had written tensors by these names.

        Args:
            error: What it raised.
            written: None if that is not known.

        """
        self._error = f"{type(error).__name__}: {error}"
        self.merges.clear()
        if written is None or written or self._new:
            self.mark_mixed(self._error)

    def mark_mixed(self, reason: str) -> None:
        """An update failed, here or on another rank, after something had changed."""
        self.require_update(
            "The model's weights are a mixture of old and new ones, because an update "
            f"failed half-way: {reason.rstrip('.')}."
        )

    def require_update(self, why: str) -> None:
        """Serve nothing until every tensor was loaded; `why` is a sentence."""
        self.touched = True
        self._why, self._stale = why, list(self._tensors)
        self._new.clear()
        self._waiting.clear()
        self.merges.clear()

    def has_new(self) -> bool:
        """Whether loads of this update have changed anything."""
        return bool(self._new) or self._why is not None

    def is_complete(self) -> bool:
        """Whether they have brought every tensor."""
        return all(tensor & self._new for tensor in self._tensors)

    def end(self) -> None:
        """A step follows: what is loaded later is another update."""
        self._new.clear()
        self._error = None
        self.touched = False

    def problem(self) -> str | None:
        """Why the weights cannot be served, and what to do, when loads have ended."""
        self._give_up_waiting()
        if self._why is None:
            return None
        stale = listed(sorted(min(tensor) for tensor in self._stale))
        return (
            f"{self._why} Not loaded since: {stale}. Load all weights, as by "
            "collective_rpc('reload_weights'), to serve again."
        )

    def _give_up_waiting(self) -> None:
        """The loads have ended: a layer of which only a part came leaves a mixture."""
        for layer, waiting in list(self._waiting.items()):
            self.mark_mixed(
                f"{listed(waiting.missing())} did not come, but vLLM packs all tensors "
                f"of a {type(layer).__name__} at once"
            )
        for merge in list(self.merges.values()):
            self.mark_mixed(f"it had {merge}")

    def agree(self, group: ProcessGroup) -> str | None:
        """`problem()` of all ranks of `group`, each of which has to call this.

        A load that failed on one rank leaves a mixture if any has loaded something.
        """
        self._give_up_waiting()
        mine = json.dumps([self._error, self.has_new(), self.is_complete()])
        states = [json.loads(text) for text in all_gather_text(mine, group)]
        errors, new, complete = zip(*states, strict=True)
        error = next(filter(None, errors), None)
        if error is not None and any(new) and not all(complete):
            self.mark_mixed(error)
        problems = all_gather_text(self.problem() or "", group)
        return next(filter(None, problems), None)


def listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
