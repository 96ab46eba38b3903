# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where in a module a forward is: the submodule that runs, and its turn in it."""

from __future__ import annotations

import inspect
import linecache
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

# A plain threading.local, as that of EngineStep.
_thread = threading.local()

_NOT_THE_MODELS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Site(NamedTuple):
    """A call in a module's forward, the same one in every forward.

    Args:
        path: The innermost submodule that runs; empty for the module itself.
        function: What is called.
        turn: How many calls of it the submodule made before in this forward.

    """

    path: str
    function: str
    turn: int

    def __str__(self) -> str:
        where = f"in {self.path!r}" if self.path else "in the module's forward"
        return f"{self.function} {where}" + (
            f", call {self.turn + 1}" * (self.turn > 0)
        )


class Running:
    """One forward: which submodules run now, and which calls they have made.

    Args:
        wants_masks: Whether this forward has to build its attention masks.

    """

    def __init__(self, wants_masks: bool) -> None:
        self.wants_masks = wants_masks
        self._paths = [""]
        self._turns: Counter[tuple[str, str]] = Counter()

    @property
    def path(self) -> str:
        return self._paths[-1]

    def enter(self, path: str) -> None:
        self._paths.append(path)

    def leave(self) -> None:
        self._paths.pop()

    def site(self, function: str) -> Site:
        """The site of a call that is made now."""
        key = (self.path, function)
        self._turns[key] += 1
        return Site(*key, self._turns[key] - 1)


def running() -> Running | None:
    """The forward of a served module, or of its trial, that this thread is in."""
    return getattr(_thread, "running", None)


@contextmanager
def run_as(forward: Running) -> Iterator[None]:
    outer = running()
    _thread.running = forward
    try:
        yield
    finally:
        _thread.running = outer


class PathHooks:
    """Hooks of submodules that tell a `Running` forward which of them runs.

    They do nothing in any other call of the module, as by a trainer.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str] | None = None) -> None:
        """Hook the submodules at `paths`, by default all."""
        wanted = None if paths is None else set(paths)
        self._handles: list[Any] = []
        for path, part in module.named_modules():
            if path and (wanted is None or path in wanted):
                self._hook(path, part)

    def _hook(self, path: str, part: nn.Module) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            forward = running()
            if forward is not None:
                forward.enter(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            forward = running()
            if forward is not None:
                forward.leave()

        self._handles += [
            part.register_forward_pre_hook(enter),
            part.register_forward_hook(leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def line_of_model() -> str:
    """The line of the model's code that runs now, as `path:number: code`."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_THE_MODELS):
            code = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno}: {code}"
        frame = frame.f_back
    return "an unknown line"
