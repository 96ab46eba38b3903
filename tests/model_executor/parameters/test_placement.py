# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pytest
import torch
from torch import nn

from vllm.model_executor.parameters.placement import place, unregistered_tensors, unwrap

CPU = torch.device("cpu")


def test_compiled_modules_are_unwrapped():
    module = nn.Linear(2, 2)
    assert unwrap(torch.compile(module, backend="eager")) is module


def test_lazy_parameters_are_named():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="lazy parameters .*: 1.weight, 1.bias"):
        unwrap(module)


def test_meta_tensors_get_room():
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        module["b"].weight = module["a"].weight
    module["a"].weight.tensor_model_parallel = True
    module["c"] = nn.BatchNorm1d(2)
    placed = place(module, CPU)
    assert placed is module
    weight = module["a"].weight
    assert module["b"].weight is weight
    assert isinstance(weight, nn.Parameter)
    assert weight.tensor_model_parallel
    assert bool(weight.isnan().all())  # until it is loaded
    assert bool((module["c"].weight == 1).all())


def test_meta_tensors_that_no_checkpoint_has():
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Linear(2, 2)})
        module["a"].register_buffer("angles", torch.ones(2), persistent=False)
    module["a"].constants = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="in no checkpoint: a.constants, a.angles"):
        place(module, CPU)


def test_unregistered_tensors_are_those_with_memory_of_their_own():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module.constant = torch.ones(2)
    module[1].table = torch.ones(3)
    module[1].alias = module[0].weight.data
    module[0].lazily = torch.ones(1, device="meta")
    found = dict(unregistered_tensors(module))
    assert found.keys() == {"constant", "1.table"}
    assert found["1.table"] is module[1].table
