# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints of a trainer on any number of ranks."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def save(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=directory)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, parent: Path) -> int:
    """Load the newest checkpoint that is complete; the steps that were done."""
    found = [path.parent for path in parent.glob("step_*/.metadata")]
    if not found:
        raise FileNotFoundError(f"There is no checkpoint in {parent}. Omit --resume.")
    newest = max(found, key=lambda path: int(path.name.removeprefix("step_")))
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=newest)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return int(newest.name.removeprefix("step_"))
