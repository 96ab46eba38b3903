# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plain modules, made parallel by their plans: checked, and served."""

import functools
import json

import pytest
from planned_model import CONFIG, PlanModel, config, logits_of, trained
from safetensors.torch import save_file

from vllm import ModelRegistry
from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_validation import validate


def test_plans_are_checked_at_one_rank_too():
    for name, plan, message in [
        ("tp_plan", {"lm_hed": "colwise"}, "matches nothing"),
        ("tp_plan", {"norm": "colwise"}, "is a LayerNorm"),
        ("pp_plan", {"hed": (["x"], ["x"])}, "matches nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_plans(PlanModel(**{name: plan}), config(), ParallelContext())


@pytest.mark.engine
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_served_by_its_plans(start, tmp_path, monkeypatch, tp, pp):
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    ModelRegistry.register_model(
        "PlanModel", lambda c, p: PlanModel(), supports_pp=True
    )
    model = trained()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    llm = start(
        model=str(tmp_path),
        processes=True,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        max_logprobs=-1,
    )
    report = validate(
        llm, functools.partial(logits_of, model), [[1, 2, 3], list(range(40))], 16
    )
    assert report.passed, report.to_json()
    assert len(report.generated) == 32
