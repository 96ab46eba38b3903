# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A module that trains, as the reference of the engine that serves it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm.model_executor.models.callable_model.logits import logits_function


def is_trainer(reference: Callable[..., Any]) -> bool:
    """Whether it is a module that is called as vLLM calls it: with positions, too."""
    if not isinstance(reference, nn.Module):
        return False
    try:
        inspect.signature(reference.forward).bind(torch.empty(0))
    except TypeError:
        return True
    return False


def logits_of_trainer(
    module: nn.Module, vocab_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A reference that calls a whole module with the weights it has at each call.

    The module is called in its evaluation mode, and gets back the one that it had.
    """
    head = logits_function(type(module).__name__, module, vocab_size, 1)
    device = next(module.parameters()).device

    def logits(token_ids: torch.Tensor) -> torch.Tensor:
        was_training = module.training
        module.eval()
        try:
            ids = token_ids.to(device)
            found = head(module(ids, torch.arange(len(ids), device=device)))
        finally:
            module.train(was_training)
        assert found is not None, "one rank has all logits"
        return found

    return logits
