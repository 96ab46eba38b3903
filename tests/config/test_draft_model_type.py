# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A draft is taken for another model's only by its whole model type."""

import pytest
from transformers import PretrainedConfig

from vllm.config.speculative import SpeculativeConfig


@pytest.mark.parametrize("model_type", ["", "pangu", "ultra_moe"])
def test_other_model_types_keep_their_architecture(model_type):
    config = PretrainedConfig(architectures=["OwnDraft"])
    config.model_type = model_type
    found = SpeculativeConfig.hf_config_override(config)
    assert found.architectures == ["OwnDraft"]
    assert found.model_type == model_type


def test_the_model_type_of_pangu_is_known():
    config = PretrainedConfig(architectures=["PanguUltraMoEForCausalLM"])
    config.model_type = "pangu_ultra_moe"
    found = SpeculativeConfig.hf_config_override(config)
    assert found.architectures == ["OpenPanguMTPModel"]
