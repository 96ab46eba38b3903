# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tensors that a sleep of level 2 has to keep on the host.

Such a sleep drops the memory of everything that was made while the model was loaded.
An update brings the parameters again, but nothing brings buffers and other constants.
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
