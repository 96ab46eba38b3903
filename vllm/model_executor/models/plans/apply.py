# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plans: a plain single-device module, made parallel as its plans say.

References: https://huggingface.co/docs/transformers/perf_infer_gpu_multi;
Megatron-LM, https://arxiv.org/abs/1909.08053
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.tree_linear import layout_invariant
from vllm.model_executor.models.plans.patterns import find_plan
from vllm.model_executor.models.plans.pipeline import cut_stage, match_stages
from vllm.model_executor.models.plans.styles import match_styles
from vllm.model_executor.models.plans.tensor import divide, match_splits
from vllm.model_executor.models.plans.whole import round_as_divided
from vllm.model_executor.parallel_context import ParallelContext


def apply_plans(
    module: nn.Module,
    vllm_config: VllmConfig,
    context: ParallelContext,
    before_cut: Callable[[nn.Module], None] | None = None,
    tp_plan: Mapping[str, str] | None = None,
) -> nn.Module:
    """Make this rank's part of `module`, if it has plans, in place.

    What other pipeline stages own is taken away. Each split parameter becomes this
    rank's part of it, under its own name and with megatron-core's marks, so that full
    checkpoints load.

    Args:
        module: What a factory built, with the whole model's parameters. It or its
            submodules have `tp_plan` or `_tp_plan`, `pp_plan` or `_pp_plan`, and
            `_no_split_modules`; a submodule's names are relative to it. Without
            them, those in `config.json` count: `base_model_tp_plan` and
            `base_model_pp_plan`. An empty one on the module means none at all.
            Those that Transformers has for its models count where they divide.
        vllm_config: The engine's config. Attention layers that other stages own leave
            its `static_forward_context`.
        context: The place of this rank.
        before_cut: Called with `module` before it is cut into stages, if it is: the
            last moment at which one rank can run the whole of it.
        tp_plan: In the place of the one that the module has.

    Returns:
        `module`. Parameter names are as before.

    Raises:
        ValueError: A plan does not fit the module or the parallel layout. The
            message has the pattern.

    """
    hf_config = vllm_config.model_config.hf_config
    splits_tensors = context.tensor_parallel_size > 1
    cuts_stages = context.pipeline_parallel_size > 1
    # Everything is checked before anything is changed, also on a single rank.
    reads_plan = splits_tensors or layout_invariant()
    if tp_plan is None:
        tp_plan = find_plan(module, "tp_plan", hf_config, reads_plan)
    styles = match_styles(module, tp_plan)
    splits = match_splits(module, styles)
    pp_plan = find_plan(module, "pp_plan", hf_config, cuts_stages)
    stages = match_stages(module, pp_plan)
    if splits_tensors:
        divide(module, styles, splits, context)
    elif layout_invariant():
        round_as_divided(module, styles)
    if cuts_stages and stages is not None:
        if before_cut is not None:
            before_cut(module)
        cut_stage(module, stages, vllm_config, context)
    return module
