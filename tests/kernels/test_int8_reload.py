# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The CPU's int8 kernel holds the scales that it reads, also after a reload."""

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from vllm.model_executor.kernels.linear.scaled_mm import cpu
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearLayerConfig,
)
from vllm.platforms import current_platform

NAMES = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        weight = torch.randint(-127, 128, (48, 32), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(48, 1), requires_grad=False)
        self.logical_widths = [48]
        self.input_scale = self.input_zero_point = self.bias = None


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU's kernel")
def test_scales_live_as_long_as_the_kernel():
    config = Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=False, is_channelwise=True, input_symmetric=True
    )
    kernel = cpu.CPUInt8ScaledMMLinearKernel(config, NAMES)
    layer = Layer()
    kernel.process_weights_for_onednn(layer)
    scales = StorageWeakRef(layer.weight_scale.untyped_storage())
    # A reload copies the values into the parameter of before, and puts it back.
    layer.weight_scale = nn.Parameter(layer.weight_scale.clone(), requires_grad=False)
    gc.collect()
    assert not scales.expired()
