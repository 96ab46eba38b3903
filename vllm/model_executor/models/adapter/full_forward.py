# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A module's own forward over a whole sequence, called as its own code calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from vllm.model_executor.models.plans.pipeline import run_stage
from vllm.sequence import IntermediateTensors

from .adapter import Adapter
from .call_forms import CallForm, call_forms, cannot_be_called, labels_of, tensor_of
from .transformers_attention import own_attention


def full_forward(
    module: nn.Module,
    input_ids: torch.Tensor,
    form: CallForm | None = None,
    head: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits of all tokens of one sequence, by the module's own code alone.

    It is run in eval mode, outside of any engine step. Where it returns the logits of
    the last token only, it is given labels, if it takes some; else it is run on each
    beginning of the sequence.

    Args:
        module: Any module; an engine may have built it.
        input_ids: int64 `[tokens]`.
        form: How it is called. Default: the first way that does not fail.
        head: Logits `[tokens, vocab]` of hidden states `[tokens, hidden]`, if that is
            what the module returns.

    Returns:
        `[tokens, vocab]`

    Raises:
        CannotBeCalledError: It could not be called.

    """
    training = module.training
    module.eval()
    try:
        with own_attention(module):
            result = _first_result(module, input_ids, form)
    finally:
        module.train(training)
    return result if head is None else head(result)


def stage_forward(
    module: nn.Module,
    input_ids: torch.Tensor,
    form: CallForm,
    received: IntermediateTensors | None,
) -> torch.Tensor | IntermediateTensors:
    """As `full_forward`, of a module that is cut into pipeline stages.

    Args:
        module: This rank's stage, in eval mode.
        input_ids: int64 `[tokens]`.
        form: How the module is called.
        received: From the stage before.

    Returns:
        What the next stage takes; on the last one `[tokens, width]`.

    """
    positions = torch.arange(len(input_ids), device=input_ids.device)
    with own_attention(module):
        result = run_stage(module, received, lambda: form(module, input_ids, positions))
    if isinstance(result, IntermediateTensors):
        return result
    return tensor_of(result).flatten(0, -2)


def own_forms(module: nn.Module, adapter: Adapter | None = None) -> list[CallForm]:
    """The ways in which a module may be called, the likeliest first."""
    adapter = adapter or Adapter()
    if adapter.forward is not None:
        return [CallForm(True, function=adapter.forward)]
    return list(call_forms(module, adapter.positions))


def _first_result(
    module: nn.Module, input_ids: torch.Tensor, form: CallForm | None
) -> torch.Tensor:
    failures = []
    for way in own_forms(module) if form is None else [form]:
        try:
            return _of_all_tokens(module, input_ids, way)
        except Exception as error:  # noqa: BLE001 - raised below, with the others
            failures.append((way, error))
    raise cannot_be_called(module, failures) from failures[0][1]


def _of_all_tokens(
    module: nn.Module, input_ids: torch.Tensor, form: CallForm
) -> torch.Tensor:
    """What the module returns, `[tokens, width]`."""
    tokens = len(input_ids)
    result = _call(module, input_ids, form)
    if len(result) == tokens:
        return result
    labels = labels_of(module)
    if labels is not None and form.function is None:
        return _call(module, input_ids, replace(form, labels=labels))
    parts = [_call(module, input_ids[: i + 1], form) for i in range(tokens)]
    return torch.cat([part[-1:] for part in parts])


def _call(module: nn.Module, input_ids: torch.Tensor, form: CallForm) -> torch.Tensor:
    positions = torch.arange(len(input_ids), device=input_ids.device)
    return tensor_of(form(module, input_ids, positions)).flatten(0, -2)
