# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention functions that no mode sees, and what stands for them in a module's code.

Such a function is plain Python, and calls its kernel without asking whether somebody
watches. Its stand-in asks first, and calls it where nobody does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.overrides import handle_torch_function

from .calls import AttentionCall, attention, is_watched
from .flex import resolved
from .readers import OTHERS, PLAIN_FUNCTIONS, PLAIN_OTHERS, READERS

# They build masks by operators that a trial must not watch, as it cannot read them.
_MASK_BUILDERS = tuple(
    ("torch.nn.attention.flex_attention", name)
    for name in ("create_block_mask", "create_mask")
)
# These have a kernel for a CPU.
_ON_A_CPU = ("flex_attention",)
_stand_ins: dict[int, Callable[..., Any]] = {}


def stand_in(function: Any) -> Callable[..., Any] | None:
    """What stands for `function`, or for a compiled form of it; None if nothing does.

    A function is known once its library has been imported.
    """
    if not callable(function) or isinstance(function, type):
        return None
    original = inspect.unwrap(function)
    names = (*PLAIN_FUNCTIONS, *PLAIN_OTHERS, *_MASK_BUILDERS)
    known = next((name for name in names if _function(name) is original), None)
    if known is None:
        return None
    made = _stand_ins.get(id(function))
    if made is None:
        made = _stand_ins[id(function)] = _make(function, known)
    return made


def unwatched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` where the innermost mode does not see what it calls."""
    if is_watched(()):  # a mode watches
        return handle_torch_function(unwatched, (), function, *args, **kwargs)
    return function(*args, **kwargs)


def by_plain_operators(call: AttentionCall) -> Any:
    """What the function that was called returns, on a device that it has no kernel for.

    Raises:
        NotImplementedError: The call asks for more than its output.

    """
    call = resolved(call)
    mask = call.mask
    if call.unservable is not None:
        raise NotImplementedError(f"attention without its kernel: {call.unservable}")
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    distance = torch.arange(keys - queries, keys, device=call.query.device)[:, None]
    distance = distance - torch.arange(keys, device=call.query.device)
    if mask is None and (call.causal or call.window is not None):
        mask = distance >= 0 if call.causal else torch.ones_like(distance).bool()
        if call.window is not None:
            mask = mask & (distance < call.window)
    if call.cu_seqlens is not None:
        place = torch.arange(keys, device=mask.device if mask is not None else None)
        document = torch.bucketize(place, call.cu_seqlens[1:].long(), right=True)
        same = document[:, None] == document
        mask = same if mask is None else mask & same
    out = attention(
        call.query,
        call.key,
        call.value,
        mask,
        call.scale,
        soft_cap=call.soft_cap,
        sinks=call.sinks,
        causal=call.causal,
        dropout=call.dropout,
    )
    return call.result(out)


def unseen_caller() -> str | None:
    """The known function that runs now, called where no stand-in took its place."""
    codes = _codes()
    frame = inspect.currentframe()
    for _ in range(_DEPTH):
        if frame is None:
            return None
        name = codes.get(frame.f_code)
        if name is not None:
            return name
        frame = frame.f_back
    return None


# Functions call the first operator from no deeper than this.
_DEPTH = 12


def _codes() -> dict[CodeType, str]:
    found = {}
    for name in (*PLAIN_FUNCTIONS, *PLAIN_OTHERS):
        function = _function(name)
        if function is not None and hasattr(function, "__code__"):
            found[function.__code__] = ".".join(name)
    return found


def _function(name: tuple[str, str]) -> Any:
    module = sys.modules.get(name[0])
    function = getattr(module, name[1], None)
    return function if function is None else inspect.unwrap(function)


def _make(function: Any, known: tuple[str, str]) -> Callable[..., Any]:
    if known in _MASK_BUILDERS:

        def build(*args: Any, **kwargs: Any) -> Any:
            return unwatched(function, *args, **kwargs)

        return build

    read = PLAIN_FUNCTIONS.get(known)
    has_kernel = known[1] in _ON_A_CPU

    def seen(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if is_watched(tensors):
            return handle_torch_function(seen, tensors, *args, **kwargs)
        on_cpu = tensors[0].device.type == "cpu"
        if read is not None and on_cpu and not has_kernel:
            return by_plain_operators(read(*args, **kwargs))
        return function(*args, **kwargs)

    seen.__name__ = known[1]
    if read is None:
        OTHERS[seen] = ".".join(known)
    else:
        READERS[seen] = read
    return seen
