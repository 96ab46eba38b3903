# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters trained by two tensor-parallel ranks, against one process."""

import copy
from types import SimpleNamespace

import pytest
import torch
from layout_models import CONFIG, build_parallel, build_plain
from lora_adapters import add, sequences
from planned_model import config
from ranks import run_ranks
from stacked_experts import Model, mixtral_block

from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdamWParams, AdapterTrainer
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.parallel_context import ParallelContext

EVERYTHING = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "up", "down"),
    *("embedding", "lm_head"),
)


STACKS = ("experts.gate_up_proj", "experts.down_proj")


def steps(
    trainer: AdapterTrainer,
    targets: tuple[str, ...] = EVERYTHING,
    stacks: tuple[str, ...] = (),
) -> list[torch.Tensor]:
    """Gradients of two adapters, and their factors after two steps."""
    for name, rank in (("a", 4), ("b", 8)):
        adapter = AdapterConfig(rank, target_modules=targets, target_parameters=stacks)
        add(trainer, name, adapter, rank)
    batch = sequences("a", 9, 5) + sequences("b", 7, seed=1)

    def loss(indices, log_probs):
        return -torch.cat(log_probs).sum()

    trainer.forward_backward(batch, loss)
    adapters = [trainer.adapters[name] for name in "ab"]
    results = [f.grad.clone() for adapter in adapters for f in adapter.parameters()]
    for _ in range(2):
        for name in "ab":
            trainer.step(name, AdamWParams(1e-3, eps=1e-4, grad_clip_norm=1.0))
        results += trainer.forward_backward(batch, loss)
    return results


def reference():
    generator = torch.Generator().manual_seed(0)
    model = build_plain(SimpleNamespace(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def on_a_rank(context: ParallelContext) -> None:
    plain = reference()
    expected = steps(AdapterTrainer(plain))
    hf_config = SimpleNamespace(**CONFIG)
    model_config = SimpleNamespace(hf_config=hf_config)
    model = build_parallel(SimpleNamespace(model_config=model_config), context)
    load_full_checkpoint(model, plain.state_dict().items(), context)
    for mine, theirs in zip(
        steps(AdapterTrainer(model, context)), expected, strict=True
    ):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 1e-4, (mine.shape, error)


def with_stacked_experts(context: ParallelContext) -> None:
    """Transformers' experts, of which each rank has a part by their own plan.

    No layer below them has an adapter: a plan is for serving, and sums no gradient.
    """
    torch.manual_seed(0)
    model = Model(mixtral_block())
    expected = steps(AdapterTrainer(copy.deepcopy(model)), (), STACKS)
    divided = Model(mixtral_block())
    divided._tp_plan = {
        "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts",
    }
    apply_plans(divided, config(), context)
    load_full_checkpoint(divided, model.state_dict().items(), context)
    trainer = AdapterTrainer(divided, context)
    assert trainer.sites["mlp.experts.down_proj"].is_divided
    for mine, theirs in zip(steps(trainer, (), STACKS), expected, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 1e-4, (mine.shape, error)


@pytest.mark.slow
@pytest.mark.parametrize("on_rank", [on_a_rank, with_stacked_experts])
def test_two_ranks(tmp_path, on_rank):
    run_ranks(on_rank, tmp_path, tensor_parallel_size=2)
