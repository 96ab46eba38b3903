# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a trainer's ranks share the work: by rows of a batch, or by parts of layers."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

# Each rank has a part of each matrix, and attends with all heads.
WHOLE = Replicate()
TP_PLAN = {
    "embedding": RowwiseParallel(input_layouts=WHOLE),
    "blocks.*.attn.[qkv]_proj": ColwiseParallel(output_layouts=WHOLE),
    "blocks.*.attn.o_proj": RowwiseParallel(input_layouts=WHOLE),
    "blocks.*.mlp.1": ColwiseParallel(),
    "blocks.*.mlp.3": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=WHOLE),
}


@dataclass
class Layout:
    """What this rank does.

    Args:
        rank: Among those that share the rows of a batch.
        ranks: So many share them.
        parallel: Whether there are other ranks at all.
        tensor_parallel: Whether they share the layers.

    """

    rank: int = 0
    ranks: int = 1
    parallel: bool = False
    tensor_parallel: bool = False

    def divide(self, model: nn.Module) -> None:
        """Leave this rank its part of the model, in place."""
        if self.tensor_parallel:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            parallelize_module(model, mesh, TP_PLAN)
        elif self.parallel:
            fully_shard(model)


def layout_of_this_rank(tensor_parallel: bool) -> Layout:
    """Of a program that torchrun has started, or that is alone."""
    if not dist.is_torchelastic_launched():
        return Layout()
    dist.init_process_group("gloo")
    if tensor_parallel:
        return Layout(parallel=True, tensor_parallel=True)
    return Layout(dist.get_rank(), dist.get_world_size(), parallel=True)


def clip_gradients(model: nn.Module, most: float) -> None:
    """Scale all gradients so that their norm is at most `most`.

    PyTorch's own function takes either divided gradients or whole ones, not both.
    """
    parameters = list(model.parameters())
    divided = [p for p in parameters if isinstance(p.grad, DTensor)]
    whole = [p for p in parameters if not isinstance(p.grad, DTensor)]
    norms = [nn.utils.get_total_norm([p.grad for p in whole])]
    if divided:
        norms += [nn.utils.get_total_norm([p.grad for p in divided]).full_tensor()]
    norm = torch.stack(norms).norm()
    for each in (divided, whole):
        nn.utils.clip_grads_with_norm_(each, most, norm)
