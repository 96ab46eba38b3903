# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which calls of an attention layer belong to an engine step, and to which KV cache.

A forward of a model that an engine built is an `EngineStep` of the thread that runs it.
All other calls of the same layers, on other threads or in between, are a trainer's.

A forward may call a layer several times, as looped and weight-shared models do. Each
call has its own keys and values, and therefore its own KV cache. The calls are counted
once, when the model is tried on a few tokens while it is loaded.
"""

import threading
from typing import Any

import torch
from torch import nn

from vllm.forward_context import is_forward_context_available

# A plain threading.local: torch.compile guards on what the calling thread has in it.
_thread = threading.local()


class AttentionCalls:
    """How often one forward of a model calls each of its attention layers."""

    def __init__(self) -> None:
        # by the layer's name in the engine; None until a forward has been counted
        self.counts: dict[str, int] | None = None
        self.paths: dict[str, str] = {}  # of those names, in the model


class EngineStep:
    """A forward of a model in an engine, as a context manager around it.

    The first step of `calls` counts; later ones must call the layers equally often.
    A trainer may call the same model. That is no step, because a step has a forward
    context and no gradients.

    Raises:
        RuntimeError: at the end, layers were called less often than the first time.
    """

    def __init__(self, calls: AttentionCalls) -> None:
        self._calls = calls
        self._counts: dict[str, int] = {}
        self._outer: EngineStep | None = None

    def __enter__(self) -> "EngineStep":
        self._outer = current_step()
        if is_forward_context_available() and not torch.is_grad_enabled():
            _thread.step = self
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        _thread.step = self._outer
        expected = self._calls.counts
        if kind is not None or self._counts == (expected or {}):
            return
        if expected is None:
            self._calls.counts = self._counts
            return
        for name in {**expected, **self._counts}:
            found, times = self._counts.get(name, 0), expected.get(name, 0)
            if found != times:
                raise RuntimeError(self._other_number(name, f"{found}", times))

    def count_all(self) -> None:
        """Count every call, as a recording of the forward makes them all."""
        self._counts = dict(self._calls.counts or {})

    def cache_index(self, name: str, caches: int) -> int:
        """Which of its `caches` KV caches the layer `name` uses in the present call.

        Raises:
            RuntimeError: all are in use by earlier calls of this step.
        """
        index = self._counts.get(name, 0)
        self._counts[name] = index + 1
        if self._calls.counts is None:
            return 0  # while calls are counted nothing is cached
        if index >= caches:
            found = f"at least {index + 1}"
            raise RuntimeError(self._other_number(name, found, caches))
        return index

    def _other_number(self, name: str, found: str, expected: int) -> str:
        path = self._calls.paths.get(name, name)
        return (
            f"The attention layer {path!r} was called {found} times in this engine "
            f"step, but {expected} times when the model was tried while it was loaded. "
            "Each call has a KV cache of its own, so their number may not depend on "
            "the tokens. Call the layer equally often in every forward."
        )


def current_step() -> EngineStep | None:
    """The engine step that this thread is in; None for a trainer's call."""
    return getattr(_thread, "step", None)


class EngineLayer(nn.Module):
    """A layer of which an engine step calls one half, and a trainer the other."""

    def __init__(self) -> None:
        super().__init__()
        # Whether this is part of a model whose forward is an EngineStep.
        self.steps_are_marked = False

    @property
    def _engine_half(self) -> nn.Module | None:
        """The half with the engine's cache; None where no engine built this."""
        raise NotImplementedError

    def in_engine_step(self) -> bool:
        """Whether a call at this moment belongs to an engine and not to a trainer."""
        if self.steps_are_marked or self._engine_half is None:
            return current_step() is not None
        # Part of a model class that vLLM runs without our wrapper around it.
        return is_forward_context_available()
