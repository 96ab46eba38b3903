# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from types import SimpleNamespace

import torch
from torch import nn

from vllm.model_executor.model_loader.reload.inplace import reload_weights


def test_parameters_that_require_gradients():
    model = nn.Linear(3, 2)
    address = model.weight.data_ptr()
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=None),
        load_config=None,
        lora_config=None,
    )
    new = {"weight": torch.ones(2, 3), "bias": torch.full((2,), 2.0)}
    reload_weights(config, model, iter(new.items()), None, is_checkpoint_format=False)
    assert model.state_dict().keys() == new.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, new[name]), name
        assert parameter.requires_grad
    assert model.weight.data_ptr() == address
