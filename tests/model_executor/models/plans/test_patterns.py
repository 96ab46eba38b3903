# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the plans of a module are found."""

from types import SimpleNamespace

import pytest
import torch
from planned_model import HIDDEN, TWO_RANKS, VOCAB, PlanModel, config
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.parallel_context import ParallelContext


def llama_config():
    vllm_config = config()
    vllm_config.model_config.hf_config = LlamaConfig()
    assert LlamaConfig.base_model_tp_plan
    return vllm_config


def test_without_a_plan_nothing_changes():
    model = PlanModel(tp_plan=None, pp_plan=None)
    before = dict(model.named_parameters())
    assert apply_plans(model, config(), TWO_RANKS) is model
    assert dict(model.named_parameters()) == before


@pytest.mark.parametrize("name", ["tp_plan", "_tp_plan"])
def test_a_submodules_names_are_relative_to_it(name):
    model = PlanModel(tp_plan=None)
    setattr(model.decoder["stack"], name, {"layers.*.up": "colwise"})
    apply_plans(model, config(), TWO_RANKS)
    up = model.decoder["stack"].layers["layer_2"].up
    assert up.weight.shape == (HIDDEN, HIDDEN) and up.out_features == HIDDEN


def test_plans_of_the_config_count_if_there_is_no_other():
    plans = {"base_model_tp_plan": {"lm_head": "colwise_rep"}}
    model = PlanModel(tp_plan=None)
    apply_plans(model, config(**plans), TWO_RANKS)
    assert model.lm_head.weight.shape == (VOCAB // 2, HIDDEN)
    model = PlanModel(tp_plan={"embedding": "rowwise"})
    apply_plans(model, config(**plans), TWO_RANKS)
    assert model.lm_head.weight.shape == (VOCAB, HIDDEN)


def test_plans_of_a_config_class_are_for_all_its_models():
    # A plain module with a Llama's config, and a model of the family without
    # what some of its patterns name.
    apply_plans(PlanModel(tp_plan=None), llama_config(), TWO_RANKS)
    model = PlanModel(tp_plan={"layers.*.mlp.up_proj": "colwise"}, pp_plan=None)
    with pytest.raises(ValueError, match="matches nothing"):
        apply_plans(model, config(), TWO_RANKS)
    model.config = LlamaConfig()
    apply_plans(model, config(), TWO_RANKS)


def test_tied_embeddings_of_a_config_class_are_no_plan_of_the_users():
    tied = LlamaConfig(tie_word_embeddings=True)
    assert "embed_tokens" in tied.base_model_tp_plan
    for module_config in (None, tied):
        model = PlanModel(tp_plan=None)
        model.config = module_config
        hf_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=tied))
        apply_plans(model, hf_config, TWO_RANKS)


@pytest.mark.parametrize("attribute", ["tp_plan", "_tp_plan"])
def test_an_empty_plan_on_the_module_means_none(attribute):
    model = PlanModel(tp_plan=None)
    model.decoder["stack"].tp_plan = {"layers.*.up": "colwise"}
    setattr(model, attribute, {})
    plans = {"base_model_tp_plan": {"lm_head": "colwise_rep"}}
    apply_plans(model, config(**plans), TWO_RANKS)
    assert model.lm_head.weight.shape == (VOCAB, HIDDEN)
    assert model.decoder["stack"].layers["layer_2"].up.out_features == 2 * HIDDEN


class Centred(nn.Embedding):
    def forward(self, input):
        return super().forward(input) - self.weight.mean()


def test_what_transformers_wrote_is_checked_where_it_divides():
    gemma = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    with torch.device("meta"):
        model = Gemma2ForCausalLM(gemma)
    hf_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=gemma))
    # An embedding that does more with its weight than to look up in it.
    embedding = model.model.embed_tokens
    embedding.__class__ = Centred
    apply_plans(model, hf_config, ParallelContext())
    with pytest.raises(ValueError, match="embed_tokens is a Centred"):
        apply_plans(model, hf_config, TWO_RANKS)
    # What the user adds is checked in any case.
    model.tp_plan = {"no_such": "colwise"}
    with pytest.raises(ValueError, match="'no_such', which matches nothing"):
        apply_plans(model, hf_config, ParallelContext())


def test_two_plans_that_differ():
    model = PlanModel(_tp_plan={"lm_head": "rowwise_rep"})
    with pytest.raises(ValueError, match="two plans name 'lm_head', as 'colwise_r"):
        apply_plans(model, config(), TWO_RANKS)
