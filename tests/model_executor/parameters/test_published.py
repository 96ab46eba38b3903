# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints that Transformers' `save_pretrained` wrote under other names."""

import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.load import weights_of
from vllm.model_executor.parameters.published import PublishedNames

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def llava() -> LlavaForConditionalGeneration:
    eyes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=32,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=eyes, image_token_index=63
    )
    return LlavaForConditionalGeneration(config)


def test_published_names_of_llava_load_whole_and_in_part(tmp_path):
    torch.manual_seed(0)
    saved, module = llava(), llava()
    saved.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    own = saved.state_dict()
    assert not published.keys() <= own.keys()
    context = ParallelContext()
    addresses = {n: p.data_ptr() for n, p in module.named_parameters()}
    load_full_checkpoint(module, iter(published.items()), context)
    torch.testing.assert_close(module.state_dict(), own, atol=0, rtol=0)

    head = {"language_model.lm_head.weight": own["lm_head.weight"] + 1}
    filled = load_full_checkpoint(module, head.items(), context)
    assert filled == {"lm_head.weight"}
    assert torch.equal(module.lm_head.weight, own["lm_head.weight"] + 1)
    # The module's own names are taken as ever.
    load_full_checkpoint(module, own.items(), context)
    torch.testing.assert_close(module.state_dict(), own, atol=0, rtol=0)
    assert addresses == {n: p.data_ptr() for n, p in module.named_parameters()}

    with pytest.raises(ValueError, match=r"surplus: language_model\.other"):
        load_full_checkpoint(
            module, {"language_model.other": torch.ones(1)}.items(), context
        )


def mixtral() -> MixtralForCausalLM:
    # Expert 10 comes after expert 2, but not by its letters.
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=11))


def qwen3_moe() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TEXT, num_experts=11, moe_intermediate_size=16)
    )


def inside(build: Callable[[], nn.Module]) -> nn.Module:
    """A module of a user's own, around one of Transformers'."""
    module = nn.Module()
    module.inner = build()
    return module


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_experts_are_merged(tmp_path, build):
    torch.manual_seed(0)
    saved = build()
    saved.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    own = saved.state_dict()
    experts = published.keys() - own.keys()
    assert len(experts) >= 3 * 11
    context = ParallelContext()
    for weights in (published.items(), iter(published.items())):
        module = build()
        load_full_checkpoint(module, weights, context)
        torch.testing.assert_close(module.state_dict(), own, atol=0, rtol=0)

    last = sorted(name for name in experts if ".experts." in name)[-1]
    some = {name: tensor for name, tensor in published.items() if name != last}
    for weights in (some.items(), iter(some.items())):
        expected = r"published has \d+ of \d+ elements of model\.layers\.0\.\S+experts"
        with pytest.raises(ValueError, match=expected):
            load_full_checkpoint(build(), weights, context, source="published")

    around = inside(build)
    names = {f"inner.{name}": tensor for name, tensor in published.items()}
    load_full_checkpoint(around, names.items(), context)
    torch.testing.assert_close(around.inner.state_dict(), own, atol=0, rtol=0)


def test_experts_may_come_in_a_call_each(tmp_path):
    """In memory that the trainer uses again; an update of some is no whole one."""
    torch.manual_seed(0)
    saved, module = mixtral(), mixtral()
    context = ParallelContext()
    load_full_checkpoint(module, saved.state_dict().items(), context)
    weights = weights_of(module, context)
    weights.update.end()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1)
    saved.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    for name, tensor in sorted(published.items()):
        buffer = tensor.clone()
        load_full_checkpoint(module, [(name, buffer)], context)
        buffer.zero_()
    assert weights.update.problem() is None
    own = saved.state_dict()
    torch.testing.assert_close(module.state_dict(), own, atol=0, rtol=0)

    weights.update.end()
    some = next(name for name in published if ".experts." in name)
    load_full_checkpoint(module, [(some, published[some])], context)
    problem = weights.update.problem()
    assert re.search(r"it had \d+ of \d+ elements of model\.layers\.0\.mlp", problem)
    load_full_checkpoint(module, own.items(), context)
    assert weights.update.problem() is None


def test_what_other_ranks_have_is_not_merged(tmp_path):
    saved = mixtral()
    saved.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in saved.state_dict().items()}
    here = {"model.layers.0.mlp.experts.down_proj"}
    names = PublishedNames(saved, here, shapes)
    found = dict(names.own(published.items(), {}, True, "published"))
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    elsewhere = {name for name, tensor in found.items() if tensor.is_meta}
    assert elsewhere == {"model.layers.0.mlp.experts.gate_up_proj"}


def test_experts_of_another_config_are_refused(tmp_path):
    mixtral().save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    more = published | {name.format(11): published[name.format(10)]}
    wide = published | {name.format(2): torch.ones(TEXT["hidden_size"], 99)}
    for weights, why in (
        (more, r"of \d+ elements of model\.layers\.0\.mlp\.experts\.down_proj"),
        (wide, r"makes model\.\S+\.experts\.down_proj; expected \d+\. .*same config"),
    ):
        with pytest.raises(ValueError, match=why):
            load_full_checkpoint(mixtral(), weights.items(), ParallelContext())
