# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Distributed checkpoints of a model in training, for any number of ranks."""

from __future__ import annotations

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

from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.parameters.layout import Layout
from vllm.training.layouts import divided_parameters, local_of


class TrainingState(Stateful):
    """A module and its optimizer, for `torch.distributed.checkpoint`.

    Saved are whole parameters under the module's own names, as a state dict of one
    device has them, and the optimizer's state in the same form. Any number of ranks
    can load them:

        dcp.save({"training": TrainingState(module, optimizer)}, checkpoint_id=path)
        dcp.load({"training": TrainingState(module, optimizer)}, checkpoint_id=path)

    Loading writes into the module's and the optimizer's own tensors.

    Args:
        module: A model that has vLLM's parallel layers among its own.
        optimizer: The optimizer of its parameters, if its state is wanted, too.

    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.module = module
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        layouts = divided_parameters(self.module)
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
        for name, layout in divided_parameters(self.module).items():
            local = local_of(self.module.get_parameter(name))
            layout.padding_of(local).zero_()
        if self.optimizer is None:
            return
        # Tensors were loaded in place, but learning rates and other numbers were not.
        optimizer = get_optimizer_state_dict(self.module, self.optimizer)
        optimizer["param_groups"] = state_dict["optimizer"]["param_groups"]
        set_optimizer_state_dict(
            self.module, self.optimizer, optim_state_dict=optimizer
        )


def _as_whole(value: Any, layout: Layout | None) -> Any:
    """This rank's tensor as a part of the whole, for a distributed checkpoint.

    What does not have the parameter's shape, such as an optimizer's step, is returned
    as it is.
    """
    if (
        layout is None
        or isinstance(value, DTensor)  # knows its layout itself
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
