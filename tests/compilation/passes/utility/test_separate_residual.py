# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from vllm.compilation.passes.utility.separate_residual import SeparateResidualPass


def test_a_sum_with_the_residual_is_no_part_of_the_product() -> None:
    down, biased = nn.Linear(8, 16, bias=False), nn.Linear(8, 16)
    norm = nn.RMSNorm(16)

    def layer(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x + down(y)
        return x, norm(x), norm(biased(y))

    def compile_with(**options: SeparateResidualPass) -> tuple:
        torch._dynamo.reset()
        options["fx_graph_cache"] = False
        compiled = torch.compile(layer, options=options)
        with torch.no_grad():
            return run_and_get_code(compiled, torch.ones(4, 16), torch.ones(4, 8))

    _, (code,) = compile_with()
    assert code.count("extern_kernels.addmm(") == 2
    outputs, (code,) = compile_with(post_grad_custom_post_pass=SeparateResidualPass())
    assert code.count("extern_kernels.addmm(") == 1  # with the bias
    for x, y in zip(outputs, layer(torch.ones(4, 16), torch.ones(4, 8)), strict=True):
        torch.testing.assert_close(x, y)
