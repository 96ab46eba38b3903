# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints of all causal models that Transformers publishes under other names."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext

MODELS = """
    afmoe aria_text axk1 axk2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 ernie4_5_moe exaone_moe flex_olmo fuyu glm4_moe glm4_moe_lite
    glm_moe_dsa gpt_neox granitemoe granitemoehybrid granitemoeshared hrm_text
    hunyuan_v1_moe hy_v3 hy_v4 kimi_linear laguna longcat_flash mellum mimo_v2_flash
    minimax minimax_m2 mixtral nemotron_h olmo_hybrid olmoe phimoe qwen2_moe
    qwen3_5_moe_text qwen3_moe qwen3_next solar_open
"""
# Of what a config has. With 12 experts their order is not that of their letters.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts": 12,
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "moe_num_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(model_type: str) -> PreTrainedConfig:
    cls = CONFIG_MAPPING[model_type]
    whole = cls()
    sizes: dict[str, Any] = {k: v for k, v in SIZES.items() if hasattr(whole, k)}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(whole, name, None)
        if isinstance(kinds, list) and kinds:  # two layers, of two kinds if there are
            sizes[name] = [next((k for k in kinds if k != kinds[-1]), kinds[-1])]
            sizes[name].append(kinds[-1])
    return cls(**sizes)


@pytest.mark.parametrize("model_type", MODELS.split())
def test_a_published_checkpoint_is_the_model(tmp_path, model_type):
    config = small(model_type)
    torch.manual_seed(0)
    saved = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    saved.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    own = saved.state_dict()
    assert published.keys() - own.keys()
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    load_full_checkpoint(module, published.items(), ParallelContext())
    torch.testing.assert_close(module.state_dict(), own, atol=0, rtol=0)
