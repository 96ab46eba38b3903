# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pipeline parallelism: stages as a `pp_plan` cuts them, chained in this process."""

import copy
import inspect

import pytest
import torch
from planned_model import PlanModel, config, logits_of, trained
from torch import nn

from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.parallel_context import ParallelContext
from vllm.sequence import IntermediateTensors

LAYERS_ENTRY = {"decoder.stack.layers": (["hidden_states"], ["hidden_states"])}
BAD_PP_PLANS = {
    "nothing": (
        {"decoder.stak.layers": (["x"], ["x"])},
        (
            "pp_plan has 'decoder.stak.layers', which matches nothing. The nearest "
            "names are decoder.stack.layers"
        ),
    ),
    "two matches": (
        LAYERS_ENTRY | {"decoder.stack.layers.*": (["x"], ["x"])},
        "matches decoder.stack.layers.layer_0 and decoder.stack.layers.layer_1",
    ),
    "twice": (
        LAYERS_ENTRY | {"decoder.stack": (["x"], ["x"])},
        "names decoder.stack twice, by 'decoder.stack.layers' and by 'decoder.stack'",
    ),
    "no stack": ({"embedding": (["x"], ["x"])}, "names 0 stacks of layers"),
    "no-split": (
        LAYERS_ENTRY | {"norm": (["x"], ["x"])},
        "'decoder.stack.layers', which cuts inside decoder.stack, a Stack;",
    ),
    "two tensors": (
        {"decoder.stack.layers": (["x", "residual"], ["x", "residual"])},
        "expected .*, because a stage hands over one tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_PP_PLANS)
def test_bad_pipeline_parallel_plan(case):
    plan, message = BAD_PP_PLANS[case]
    model = PlanModel(pp_plan=plan)
    if case == "no-split":
        model._no_split_modules = {"Stack"}
    with pytest.raises(ValueError, match=message):
        apply_plans(model, config(), ParallelContext(pipeline_parallel_size=2))


def test_an_empty_stage():
    with pytest.raises(ValueError, match="stage 3 of 4 is left empty: 'decoder.stack."):
        apply_plans(PlanModel(), config(), ParallelContext(pipeline_parallel_size=4))


def stages_of(model_cls, weights, size):
    stages = []
    for rank in range(size):
        context = ParallelContext(
            pipeline_parallel_size=size, pipeline_parallel_rank=rank
        )
        stage = apply_plans(model_cls(), config(), context)
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
        stages.append(stage)
    return stages


def run_stages(stages, ids):
    handed = None
    for stage in stages:
        # later stages do not know the tokens
        known = ids if handed is None else torch.full_like(ids, -1)
        handed = stage(known, torch.arange(len(ids)), intermediate_tensors=handed)
    return stages[-1].compute_logits(handed)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
@torch.no_grad()
def test_stages_compute_what_the_whole_module_does(kind, size):
    model = trained(kind)
    stages = stages_of(lambda: PlanModel(kind), model.state_dict(), size)
    ids = torch.arange(7)
    torch.testing.assert_close(run_stages(stages, ids), logits_of(model, ids))
    assert isinstance(
        stages[0](ids, torch.arange(7), intermediate_tensors=None), IntermediateTensors
    )
    # Each tensor of the checkpoint keeps its name; layers are on one stage only.
    names = [set(stage.state_dict()) for stage in stages]
    assert set().union(*names) == set(model.state_dict())
    for name in model.state_dict():
        held = sum(name in stage for stage in names)
        assert held == (size if name.startswith("norm.") else 1), name


def test_a_layer_that_is_on_two_stages():
    model = PlanModel()
    layers = model.decoder["stack"].layers
    layers["layer_2"] = layers["layer_0"]
    with pytest.raises(ValueError, match="layer_2 shares weights with another pipel"):
        apply_plans(model, config(), ParallelContext(pipeline_parallel_size=2))


@torch.no_grad()
def test_stages_with_tied_weights():
    model = trained(tied=True)
    stages = stages_of(lambda: PlanModel(tied=True), model.state_dict(), 3)
    ids = torch.arange(7)
    torch.testing.assert_close(run_stages(stages, ids), logits_of(model, ids))
    # Both ends have it, by either name.
    for stage in (stages[0], stages[2]):
        weights = dict(stage.named_parameters(remove_duplicate=False))
        assert weights["embedding.weight"] is weights["lm_head.weight"]
    assert "lm_head.weight" not in stages[1].state_dict()


def test_a_stage_keeps_the_classes_of_its_modules():
    """What is replaced is a class, so that copies hand over at their own ends."""
    for rank in range(3):
        context = ParallelContext(pipeline_parallel_size=3, pipeline_parallel_rank=rank)
        stage = apply_plans(PlanModel(tied=True), config(), context)
        assert isinstance(stage, PlanModel) and type(stage).__name__ == "PlanModel"
        assert not any("forward" in vars(part) for part in stage.modules())
        assert isinstance(
            stage.embedding, PPMissingLayer if rank == 1 else nn.Embedding
        )
        assert isinstance(stage.lm_head, PPMissingLayer if rank == 1 else nn.Linear)
        other = copy.deepcopy(stage)
        ends = {
            id(part.stage_boundary)
            for part in other.modules()
            if hasattr(part, "stage_boundary")
        }
        assert ends == {id(other.stage_boundary)} != {id(stage.stage_boundary)}


def test_a_module_with_a_forward_of_its_own():
    """An instance's forward is found before its class's, and runs as before."""
    model, size = trained(), 2
    ids = torch.arange(7)

    def build():
        built = PlanModel()
        forward = built.forward
        built.forward = lambda input_ids, positions: -forward(input_ids, positions)
        return built

    stages = stages_of(build, model.state_dict(), size)
    assert "intermediate_tensors" in inspect.signature(stages[0].forward).parameters
    with torch.no_grad():
        expected = model.compute_logits(-model(ids, torch.arange(7)))
        torch.testing.assert_close(run_stages(stages, ids), expected)


class OfBatches(PlanModel):
    """Works on `[1, tokens]` inside, as Transformers' models do."""

    def forward(self, input_ids, positions):
        return super().forward(input_ids[None], positions[None])[0]


@pytest.mark.parametrize("size", [2, 3])
@torch.no_grad()
def test_stages_of_a_module_that_works_on_batches(size):
    """What goes between stages is `[tokens, hidden]`, whatever is inside."""
    model = trained()
    stages = stages_of(OfBatches, model.state_dict(), size)
    ids = torch.arange(7)
    handed = stages[0](ids, torch.arange(7), intermediate_tensors=None)
    assert handed["hidden_states"].dim() == 2
    torch.testing.assert_close(run_stages(stages, ids), logits_of(model, ids))


@torch.no_grad()
def test_a_plan_in_another_order():
    """The head is after the stack, though a merged plan may name it first."""
    model = trained()
    order = list(PlanModel().pp_plan.items())

    def build():
        return PlanModel(pp_plan=dict(reversed(order)))

    names = [name for name, _ in reversed(order)]
    assert names.index("lm_head") < names.index("decoder.stack.layers")
    stages = stages_of(build, model.state_dict(), 2)
    assert "lm_head.weight" in stages[1].state_dict()
    assert "embedding.weight" not in stages[1].state_dict()
    ids = torch.arange(7)
    torch.testing.assert_close(run_stages(stages, ids), logits_of(model, ids))
