# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's fused experts under the names of single experts, in every division."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from vllm.config import get_current_vllm_config
from vllm.distributed.weight_sync.manifest import manifest_of
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.names import ModuleNames

EXPERTS, HIDDEN, WIDTH = 4, 64, 96
# The function has this name since 0.32.0.
build = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE


class Mixture(nn.Module):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.experts = build(
            EXPERTS,
            2,
            HIDDEN,
            WIDTH,
            params_dtype=torch.float32,
            prefix=f"{name}.experts",
            **options,
        )

    @property
    def layer(self) -> Any:
        return next(
            part for part in self.modules() if isinstance(part, fused_moe.RoutedExperts)
        )


def checkpoint(has_bias: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate_proj", (WIDTH, HIDDEN)),
            ("up_proj", (WIDTH, HIDDEN)),
            ("down_proj", (HIDDEN, WIDTH)),
        ):
            tensors[f"experts.{expert}.{name}.weight"] = torch.randn(shape)
            if has_bias:
                tensors[f"experts.{expert}.{name}.bias"] = torch.randn(shape[:1])
    return tensors


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor for all experts, as in checkpoints of Transformers."""

    def of(name: str) -> torch.Tensor:
        parts = [tensors[f"experts.{e}.{name}.weight"] for e in range(EXPERTS)]
        return torch.stack(parts)

    gate_up = torch.cat([of("gate_proj"), of("up_proj")], dim=1)
    return {"experts.gate_up_proj": gate_up, "experts.down_proj": of("down_proj")}


def compare_with_vllm(has_bias: bool, context: ParallelContext) -> None:
    """Our loads, by name or stacked, give the parameters that vLLM's loader gives."""
    tensors = checkpoint(has_bias)
    expected = Mixture("vllm", has_bias=has_bias)
    inner = ((n.removeprefix("experts."), t) for n, t in tensors.items())
    set(expected.layer.load_weights(inner))
    sources: list[Iterable[tuple[str, torch.Tensor]]] = [
        list(tensors.items()),
        iter(tensors.items()),
    ]
    if not has_bias:
        sources.append(list(stacked(tensors).items()))
    for number, source in enumerate(sources):
        model = Mixture(f"ours{number}", has_bias=has_bias)
        loaded = load_full_checkpoint(model, source, context, "the test's")
        assert {n for n, _ in model.named_parameters()} <= loaded
        for leaf, parameter in expected.layer.named_parameters():
            assert torch.equal(getattr(model.layer, leaf), parameter), leaf
    held = ModuleNames(model, context).held
    elements = sum(box.numel() for entry in held for box in entry.layout.boxes)
    assert elements == sum(p.numel() for p in model.layer.parameters())
    for entry in held:
        assert entry.layout.holds(entry.local_tensor, tensors[entry.name]), entry.name


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "division",
    [{}, {"tensor_parallel_size": 2}, {"data_parallel_size": 2}],
    ids=["alone", "tensor-parallel", "expert-parallel"],
)
def test_loads_as_vllm_does(
    tmp_path: Path, has_bias: bool, division: dict[str, int]
) -> None:
    run_ranks(
        partial(compare_with_vllm, has_bias),
        tmp_path,
        enable_expert_parallel="data_parallel_size" in division,
        **division,
    )


def refuse(context: ParallelContext) -> None:
    get_current_vllm_config().parallel_config.enable_eplb = True
    model = Mixture("moved", enable_eplb=True, num_redundant_experts=2)
    names = ModuleNames(model, context)
    match = r"experts\.(routed_experts\.)?w13_weight is of a fused layer with redundant"
    with pytest.raises(ValueError, match=match):
        manifest_of(names, torch.device("cpu"))
    before = model.layer.w13_weight.clone().nan_to_num_()
    name = next(name for name in names.entries if name.endswith("w13_weight"))
    with pytest.raises(ValueError, match=match):
        load_full_checkpoint(
            model, [(name, model.layer.w13_weight)], context, "the test's"
        )
    assert torch.equal(model.layer.w13_weight.nan_to_num(), before)


def test_experts_that_move_are_refused(tmp_path: Path) -> None:
    run_ranks(refuse, tmp_path)
