# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How far rounding alone moves a model's outputs.

A second, exact copy of the model may not fit, and packed or fused layers have none. So
the output of every submodule is changed at random by about its last bit, by which two
kernels of the same layer may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


def relative_error(dtype: torch.dtype, device: torch.device) -> float:
    """The usual rounding error of a layer's output, relative to the output.

    Noise of this size moves the outputs of the whole model about as far as they are
    from those in float32. In float32 it also covers sums in another order and, on a
    GPU, attention in TF32, which has 11 bits. vLLM's kernels compute it so in the exact
    mode, and where a user asks for it.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return torch.finfo(dtype).eps / 6  # of at most eps / 2
    return 2.0**-22 if device.type == "cpu" else 2.0**-12


@contextmanager
def rounded_otherwise(root: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Change the outputs of all submodules of `root` by `size`, relative to them.

    What is replicated on the ranks of a group stays equal there, because the noise
    depends on the turn of the call and the shape only.
    """
    turns = count(seed * 1_000_003)

    def change(tensor: Any) -> Any:
        if type(tensor) is not torch.Tensor or not tensor.is_floating_point():
            return tensor
        generator = torch.Generator(tensor.device).manual_seed(next(turns))
        noise = torch.randn(
            tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32
        )
        return (tensor * (1 + size * noise)).to(tensor.dtype)

    with ExitStack() as stack:
        for part in root.modules():
            handle = part.register_forward_hook(
                lambda part, args, output: tree_map(change, output)
            )
            stack.callback(handle.remove)
        yield
