# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a user declares of a module, because a trial cannot show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Adapter:
    """How to serve a module as it stands, for `register_model(..., adapter=...)`.

    All that is left out is found by trying the module on a few tokens. Functions have
    to be picklable by cloudpickle, as factories do.

    Args:
        forward: `forward(module, input_ids, positions)` calls the module in place of
            `module(input_ids)`. Both arguments are int64 `[1, tokens]`; it returns
            what the module returns: logits or hidden states `[1, tokens, ...]`, alone,
            first in a tuple, or in an object.
        positions: The argument of the module's forward that takes positions.
        head: `head(module, hidden_states)` returns logits `[tokens, vocab]` of hidden
            states `[tokens, hidden]`, or the name of the submodule that does. The
            forward then returns hidden states.

    Example: `Adapter(forward=lambda module, ids, positions: module(ids, targets=ids))`

    """

    forward: Callable[[nn.Module, torch.Tensor, torch.Tensor], Any] | None = None
    positions: str | None = None
    head: Callable[[nn.Module, torch.Tensor], torch.Tensor] | str | None = None
