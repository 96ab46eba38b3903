# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Fused experts whose weights change have the weights that their kernel reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from vllm.model_executor.layers import fused_moe
from vllm.platforms import current_platform

# The function has this name since 0.32.0.
build = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE


def layer_of(name: str) -> Any:
    layer = build(4, 2, 64, 96, params_dtype=torch.float32, prefix=name)
    return getattr(layer, "routed_experts", layer)


def load(layer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for leaf, shape in (("w13_weight", (4, 192, 64)), ("w2_weight", (4, 64, 96))):
        weight = torch.randn(shape, generator=generator)
        setattr(layer, leaf, torch.nn.Parameter(weight, requires_grad=False))
    layer.quant_method.process_weights_after_loading(layer)


def compare_with_a_new_layer(context: Any) -> None:
    updated, new = layer_of("updated"), layer_of("new")
    load(updated, seed=0)
    load(updated, seed=1)
    load(new, seed=1)
    for leaf in ("w13_weight", "w2_weight"):
        assert torch.equal(getattr(updated, leaf), getattr(new, leaf)), leaf


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU's kernel")
def test_an_update_is_packed_as_a_first_load_is(tmp_path: Path) -> None:
    run_ranks(compare_with_a_new_layer, tmp_path)
