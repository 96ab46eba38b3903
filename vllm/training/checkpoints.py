# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training a model of vLLM's parallel layers: what one device has and ranks lack.

Process groups under torchrun, initial weights that do not depend on the number of
ranks, the norm of all gradients, and checkpoints that any number of ranks can load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import Layout, layer_layout
from vllm.platforms import current_platform

__all__ = [
    "TrainingState",
    "clip_grad_norm_",
    "initialize_parameters",
    "tensor_parallel_group",
]


@contextmanager
def tensor_parallel_group() -> Iterator[ParallelContext]:
    """vLLM's process groups in a program that torchrun started.

    All processes are one tensor-parallel group. Inside, vLLM's layers can be built,
    and the current CUDA device is this rank's.

    Raises:
        RuntimeError: the program was not started by torchrun.

    """
    try:
        rank, local_rank, size = (
            int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        )
    except KeyError as error:
        raise RuntimeError(
            f"The environment variable {error} is not set. Start the program with "
            "`torchrun --nproc-per-node N program.py`."
        ) from None
    # The name of the CPU's shared memory; alike on all ranks, and this run's own.
    os.environ.setdefault("VLLM_DIST_IDENT", f"torchrun-{os.environ['MASTER_PORT']}")
    backend = "gloo"
    if current_platform.is_cuda_alike():
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    parallel_config = ParallelConfig(
        tensor_parallel_size=size, distributed_executor_backend="external_launcher"
    )
    with set_current_vllm_config(VllmConfig(parallel_config=parallel_config)):
        init_distributed_environment(size, rank, "env://", local_rank, backend)
        initialize_model_parallel(size)
        try:
            yield ParallelContext.from_config(parallel_config)
        finally:
            cleanup_dist_env_and_memory()


def initialize_parameters(
    module: nn.Module, initialize: Callable[[str, torch.Tensor], object]
) -> None:
    """Give every parameter its initial values, the same for any number of ranks.

    vLLM's layers leave their parameters uninitialized. Each rank fills each whole
    parameter and keeps its part, so `initialize` has to draw alike on all ranks: seed
    the generator before.

    Args:
        module: has vLLM's parallel layers and others.
        initialize: called as `initialize(name, tensor)` for each whole parameter, in
            order, to fill it in place.

    """
    layouts = _layouts(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            layout = layouts.get(name)
            if layout is None:
                initialize(name, parameter)
                continue
            whole = parameter.new_empty(layout.shape)
            initialize(name, whole)
            layout.padding_of(parameter).zero_()
            layout.load(parameter, whole)


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm, over all ranks, is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, with every element of the whole model counted
    once: a parameter that ranks share counts on the first of them.

    Returns:
        The norm before, float32 and alike on all ranks.

    """
    layouts, group = _layouts(module), get_tp_group()
    counted: list[torch.Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        if (layout := layouts.get(name)) is not None:
            parts = layout.parts_of(parameter.grad)
            counted += [local for box, local in parts if box.replica == 0]
        elif group.rank_in_group == 0:
            counted.append(parameter.grad)
    square = torch.zeros((), device=group.device)
    for grad in counted:
        square += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
    torch.distributed.all_reduce(square, group=group.device_group)
    norm = square.sqrt()
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return norm


class TrainingState(Stateful):
    """A module and its optimizer, for `torch.distributed.checkpoint`.

    Saved are whole parameters under the module's own names, as a state dict of one
    device has them, and the optimizer's state likewise. Any number of ranks can load
    them:

        dcp.save({"training": TrainingState(module, optimizer)}, checkpoint_id=path)
        dcp.load({"training": TrainingState(module, optimizer)}, checkpoint_id=path)

    Loading writes into the module's and the optimizer's tensors.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.module = module
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        layouts = _layouts(self.module)
        state: dict[str, Any] = {
            "model": {
                name: _as_whole(tensor, layouts.get(name))
                for name, tensor in self.module.state_dict().items()
            }
        }
        if self.optimizer is not None:
            optimizer: dict[str, Any] = dict(
                get_optimizer_state_dict(self.module, self.optimizer)
            )
            optimizer["state"] = {
                name: {
                    key: _as_whole(value, layouts.get(name))
                    for key, value in values.items()
                }
                for name, values in optimizer["state"].items()
            }
            state["optimizer"] = optimizer
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, layout in _layouts(self.module).items():
            layout.padding_of(self.module.get_parameter(name)).zero_()
        if self.optimizer is None:
            return
        # Tensors were loaded in place; learning rates and the like were not.
        optimizer = get_optimizer_state_dict(self.module, self.optimizer)
        optimizer["param_groups"] = state_dict["optimizer"]["param_groups"]
        set_optimizer_state_dict(
            self.module, self.optimizer, optim_state_dict=optimizer
        )


def _layouts(module: nn.Module) -> dict[str, Layout]:
    """The layouts of all divided parameters, by name; tied ones by each name."""
    layouts = {}
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            layout = layer_layout(layer, parameter)
            if layout is not None:
                layouts[f"{prefix}.{name}" if prefix else name] = layout
    return layouts


def _as_whole(value: Any, layout: Layout | None) -> Any:
    """This rank's tensor as a part of the whole, for a distributed checkpoint.

    Whatever has not the parameter's shape, such as an optimizer's step, stays as it is.
    """
    if (
        layout is None
        or not isinstance(value, torch.Tensor)
        or value.shape != layout.local_shape
    ):
        return value
    assert layout.axis is not None  # vLLM's layers divide one axis
    parts = layout.parts_of(value.detach())
    shards = [local for _, local in parts]
    offsets = [box.whole for box, _ in parts]
    group = get_tp_group().device_group
    mesh = DeviceMesh.from_group(group, value.device.type, mesh_dim_names=("tp",))
    return DTensor.from_local(
        LocalShardsWrapper(shards, offsets),
        mesh,
        [Shard(layout.axis)],
        run_check=False,
        shape=layout.shape,
        stride=torch.empty(layout.shape, device="meta").stride(),
    )
