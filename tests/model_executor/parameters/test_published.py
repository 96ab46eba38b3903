# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints that Transformers' `save_pretrained` wrote under other names."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext

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


def test_experts_that_would_be_merged_are_refused_by_name(tmp_path):
    module = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=2))
    module.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"part of .*experts\.(gate_up|down)_proj"):
        load_full_checkpoint(module, published.items(), ParallelContext())
