# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pytest
import torch
from torch import fx

from vllm.compilation.piecewise_backend import (
    create_concrete_args,
    get_fake_args_from_graph,
)


@pytest.fixture
def piece() -> fx.GraphModule:
    """A piece that begins with a switch of the grad mode, as Dynamo may cut one."""
    graph = fx.Graph()
    graph.call_function(torch._C._set_grad_enabled, (False,))
    inputs = []
    for name, size in (("x", 2), ("y", 3)):
        inputs.append(graph.placeholder(name))
        inputs[-1].meta["example_value"] = torch.ones(size)
    graph.output(tuple(inputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_fake_inputs_are_complete(piece):
    assert [arg.shape for arg in get_fake_args_from_graph(piece)] == [(2,), (3,)]


def test_concrete_inputs_are_complete(piece):
    assert [arg.shape for arg in create_concrete_args(piece, 8)] == [(2,), (3,)]
