# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a model's parameters need beside them after a sleep of level 2.

That drops the memory of everything that was made while the model was loaded. Parameters
are loaded again; the others have to be kept on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def tensors_to_keep(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers, and what the model names in `unregistered_tensors()`, if it can."""
    yield from model.named_buffers()
    more = getattr(model, "unregistered_tensors", None)
    if more is not None:
        yield from more()
