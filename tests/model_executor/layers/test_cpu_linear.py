# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import torch

from vllm.model_executor.layers.utils import cpu_unquantized_gemm


def test_a_layer_is_called_before_its_weights_are_packed():
    layer = torch.nn.Linear(4, 3)
    x = torch.ones(2, 4)
    result = cpu_unquantized_gemm(layer, x, layer.weight, layer.bias)
    assert torch.equal(result, layer(x))


def test_a_packed_layer_is_called_through_its_kernel():
    layer = torch.nn.Linear(4, 3)
    layer.cpu_linear = lambda x, weight, bias: "packed"
    result = cpu_unquantized_gemm(layer, torch.ones(2, 4), layer.weight, layer.bias)
    assert result == "packed"
