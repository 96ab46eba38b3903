# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linear layers that share an input are one product in a recording."""

import pytest
import torch
from torch import nn

from vllm.model_executor.models.adapter.merged_products import LINEAR, lay_side_by_side
from vllm.model_executor.models.adapter.recording import TOKENS, record

WIDTH = 16


class Model(nn.Module):
    """`q`, `k` and `v` share an input; `out` has the same number of inputs."""

    def __init__(self, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(8, WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias)
        self.k = nn.Linear(WIDTH, WIDTH // 2, bias)
        self.out = nn.Linear(WIDTH, WIDTH, bias)
        self.v = nn.Linear(WIDTH, WIDTH // 2, bias)

    def forward(self, ids, positions):
        x = self.embedding(ids)[None]
        q = self.q(x).view(1, -1, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(1, -1, 2, 4) for layer in (self.k, self.v))
        mixed = q.transpose(1, 2) + torch.cat([k, v], dim=2)
        return self.out(mixed.flatten(-2))[0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def arguments(tokens):
    return torch.arange(tokens) % 8, torch.arange(tokens)


def products(graph):
    return len(graph.graph.find_nodes(op="call_function", target=LINEAR))


def assert_same(graph, model):
    for tokens in (1, 2, TOKENS, 60):
        expected = model(*arguments(tokens))
        assert torch.allclose(graph(*arguments(tokens)), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_those_that_lie_side_by_side_are_merged(bias):
    model = Model(bias)
    before = {name: p.clone() for name, p in model.named_parameters()}
    objects = dict(model.named_parameters())
    lay_side_by_side(model)
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert parameter.is_contiguous()
        assert torch.equal(parameter, before[name])
    graph = record(model, *arguments(TOKENS), 64, 64)
    # k's neighbour is out, which has another input, and then v.
    assert products(graph) == 3
    assert_same(graph, model)
    for parameter in model.parameters():  # in place, as weights are updated
        parameter.normal_(std=0.3)
    assert_same(graph, model)


@torch.no_grad()
def test_without_neighbours_nothing_is_merged():
    graph = record(Model(), *arguments(TOKENS), 64, 64)
    assert products(graph) == 4


def tied(model):
    model.k.weight = model.v.weight


def tied_by_memory(model):
    model.k.weight.data = model.v.weight.data


def a_part(model):
    model.k.weight.data = torch.randn(WIDTH, WIDTH)[: WIDTH // 2]


@torch.no_grad()
@pytest.mark.parametrize("share", [tied, tied_by_memory, a_part])
def test_shared_memory_stays_shared(share):
    model = Model()
    share(model)
    before = [model.k.weight.data_ptr(), model.v.weight.data_ptr()]
    lay_side_by_side(model)
    after = [model.k.weight.data_ptr(), model.v.weight.data_ptr()]
    assert after[0] == before[0]
    assert (after[0] == after[1]) == (before[0] == before[1])
    assert_same(record(model, *arguments(TOKENS), 64, 64), model)


class Flat(Model):
    """Looks at a result in the order of its memory."""

    def forward(self, ids, positions):
        x = self.embedding(ids)
        return (self.q(x).view(-1) * 2).view(-1, WIDTH) + self.k(x).repeat(1, 2)


class ResultsInPlace(Model):
    """Changes both results, once there are both."""

    def forward(self, ids, positions):
        x = self.embedding(ids)
        q, k = self.q(x), self.k(x)
        q.view(-1, 4, 4).add_(1)
        k.mul_(2)
        return q + k.repeat(1, 2)


class InputInPlace(Model):
    """Changes the input by another name, between two products of it."""

    def forward(self, ids, positions):
        x = self.embedding(ids)
        q = self.q(x)
        x.view(-1, 4, 4).add_(1)
        return q + self.k(x).repeat(1, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "left"), [(Flat, 2), (ResultsInPlace, 1), (InputInPlace, 2)]
)
def test_only_what_stays_the_same_is_merged(build, left):
    model = build()
    lay_side_by_side(model)
    graph = record(model, *arguments(TOKENS), 64, 64)
    assert products(graph) == left
    assert_same(graph, model)
