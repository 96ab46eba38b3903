# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`tp_plan="auto"`, derived and proven: all ranks give together what one gives."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import torch
from torch import nn

from vllm.logger import init_logger
from vllm.model_executor.models.adapter.adapter import Adapter
from vllm.model_executor.models.adapter.call_forms import cannot_be_called, tensor_of
from vllm.model_executor.models.adapter.full_forward import own_forms
from vllm.model_executor.models.adapter.seen import token_ids
from vllm.model_executor.models.adapter.transformers_attention import (
    use_seen_attention,
)
from vllm.model_executor.models.derived_plan.flow import Flow, Watch, values_of
from vllm.model_executor.models.derived_plan.plan import GROUPS, AutoPlan, plan_of
from vllm.model_executor.models.plans.patterns import kind_of
from vllm.model_executor.models.plans.styles import match_styles
from vllm.model_executor.models.plans.tensor import divide, match_splits
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import MARK, megatron_layout

logger = init_logger(__name__)

TOKENS = 7
# Of the largest logit. What is divided wrongly is far beyond it.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}


def derive_plan(
    module: nn.Module,
    adapter: Adapter | None,
    vocab_size: int,
    device: torch.device,
    context: ParallelContext,
) -> dict[str, str]:
    """A `tp_plan` for `module`, from what its layers give to each other.

    Copies of the module are run on a few tokens: the whole one on this rank, and its
    part on each. Parameters get values for the length of one call only. All ranks call
    this together.

    Args:
        module: Whole; its parameters may be on the meta device.
        adapter: What the user has said of its forward.
        vocab_size: Of the tokens.
        device: Where it is run.
        context: The place of this rank.

    Raises:
        ValueError: No layers can be divided; the message names them.

    """
    ids = token_ids(TOKENS, vocab_size, device)
    flow = Flow(vocab_size)
    expected, form, heads = _run_whole(module, adapter, ids, flow)
    ranks = context.tensor_parallel_size
    tried: list[AutoPlan] = []
    for groups in (g for n in (3, 2, 1) for g in combinations(GROUPS, n)):
        plan = plan_of(flow, ranks, groups)
        linears = [style for style in plan.styles.values() if style == "rowwise"]
        if not linears or any(plan.styles == other.styles for other in tried):
            continue
        problem = _problem(module, plan, ids, form, expected, heads, context)
        tried.append(plan)
        if problem is None:
            if not {"colwise", "packed_colwise"} & set(plan.styles.values()):
                break  # the vocabulary alone
            logger.info_once(
                'tp_plan="auto" of %s, for %d ranks:\n%s',
                kind_of(module),
                ranks,
                plan.table(module),
            )
            return plan.styles
        logger.info_once(
            "%s is not divided by %s: %s", kind_of(module), groups, problem
        )
    plan = plan_of(flow, ranks, ())
    for other in reversed(tried):
        plan.whole |= dict.fromkeys(other.styles, "whole: the parts do not add up")
        plan.whole |= other.whole
    raise ValueError(
        f'{kind_of(module)}: tp_plan="auto" finds no layers that {ranks} ranks can '
        f"divide. Write a tp_plan, or start with tensor_parallel_size=1.\n"
        f"{plan.table(module)}"
    )


def _run_whole(
    module: nn.Module, adapter: Adapter | None, ids: torch.Tensor, flow: Flow
) -> tuple[torch.Tensor, Any, list[Any]]:
    """The whole module's result, how it is called, and its attention calls' sizes."""
    failures: list[Any] = []
    for form in own_forms(module, adapter or Adapter()):
        seen = Flow(flow.vocab_size)
        whole = _copy(module)
        shapes = {name: (p.shape, p.dtype) for name, p in whole.named_parameters()}

        def make(name: str, shapes: Any = shapes) -> torch.Tensor:
            shape, dtype = shapes[name]
            return values_of(name, shape, ids.new_empty((), dtype=dtype))

        watch = Watch(whole, ids.device, make, seen)
        try:
            result = _run(whole, watch, form, ids)
        except Exception as error:  # noqa: BLE001 - raised below, with the others
            failures.append((form, error))
            continue
        watch.finish(result)
        vars(flow).update(vars(seen))
        return result, form, watch.heads
    raise cannot_be_called(module, failures) from failures[0][1]


def _problem(
    module: nn.Module,
    plan: AutoPlan,
    ids: torch.Tensor,
    form: Any,
    expected: torch.Tensor,
    heads: list[Any],
    context: ParallelContext,
) -> str | None:
    """Why the ranks together do not give what one gives; None if they do."""
    part = _copy(module)
    whole_shapes = {name: p.shape for name, p in part.named_parameters()}
    styles = match_styles(part, plan.styles)
    divide(part, styles, match_splits(part, styles), context)
    parameters = dict(part.named_parameters())

    def make(name: str) -> torch.Tensor:
        parameter = parameters[name]
        like = ids.new_empty((), dtype=parameter.dtype)
        whole = values_of(name, whole_shapes[name], like)
        if not getattr(parameter, MARK, False):
            return whole
        shard = whole.new_empty(parameter.shape)
        megatron_layout(parameter, context).load(shard, whole)
        return shard

    watch = Watch(part, ids.device, make)
    try:
        result = _run(part, watch, form, ids)
    except Exception as error:  # noqa: BLE001 - it is what the answer is about
        return f"its code fails with a part of the features ({error})"
    sizes = {(len(watch.heads), *size[1:]) for size in watch.heads}
    if sizes != {(len(heads), *size[1:]) for size in heads}:
        return "its code takes a part of the features for other heads"
    if result.shape != expected.shape:
        return f"the result is {list(result.shape)}, not {list(expected.shape)}"
    distance = float((result.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    if not distance <= ROUNDING.get(expected.dtype, 0.1) * largest:
        return f"the ranks' result differs by {distance:.2g} from the whole one's"
    return None


def _copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module).eval()
    use_seen_attention(copied)
    return copied


def _run(module: nn.Module, watch: Watch, form: Any, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(ids), device=ids.device)
    with torch.no_grad(), watch:
        watch.mark_tokens(ids)
        return tensor_of(form(module, ids, positions))
