# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A forward is recorded as a graph for any number of tokens, or not at all."""

import pytest
import torch
from torch import nn

from vllm.model_executor.models.adapter.recording import (
    TOKENS,
    UnrecordableError,
    digest,
    example,
    record,
)

MOST = 4096


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids, positions):
        x = self.embedding(ids) * self.scale + positions[:, None]
        return self.linear(x).view(ids.shape[0], 2, -1).flatten(1)


def arguments(tokens):
    return torch.arange(tokens) % 16, torch.arange(tokens)


@torch.no_grad()
def test_it_holds_for_other_numbers_of_tokens_and_new_values():
    model = Model()
    graph = record(model, *arguments(TOKENS), MOST, MOST)
    for parameter in model.parameters():  # in place, as weights are updated
        parameter.mul_(3)
    for tokens in (1, 2, 50, MOST):
        found = graph(*arguments(tokens))
        assert torch.equal(found, model(*arguments(tokens)))
    assert not graph.shape_env.guards
    held = {id(p) for p in graph.parameters()}
    assert held == {id(p) for p in model.parameters()}


@torch.no_grad()
@pytest.mark.parametrize(
    "condition",
    [
        lambda tokens: tokens < 20,
        lambda tokens: tokens < 2048,
        lambda tokens: tokens == 1001,
        lambda tokens: tokens % 1024 == 1023,
    ],
)
def test_what_depends_on_the_number_of_tokens_is_refused(condition):
    model = Model()

    def forward(ids, positions):
        x = model(ids, positions)
        return -x if condition(ids.shape[0]) else x

    with pytest.raises(UnrecordableError, match=f"for {TOKENS} tokens and false for"):
        record(forward, *arguments(TOKENS), MOST, MOST)


@torch.no_grad()
def test_other_sizes_of_the_inputs_are_no_numbers_of_tokens():
    """The width of embeddings, and the axes of positions, which a module asks for."""
    linear = nn.Linear(8, 8)

    def forward(embeddings, positions):
        assert embeddings.shape[1] == 8 and positions.shape[0] != 4
        axes = positions.expand(3, -1)
        return linear(embeddings) + axes.sum(0)[:, None]

    def arguments(tokens):
        return torch.randn(tokens, 8), torch.arange(3 * tokens).view(3, tokens)

    graph = record(forward, *arguments(TOKENS), MOST, MOST)
    for tokens in (1, 3, 4, 8, 50, MOST):
        given = arguments(tokens)
        assert torch.equal(graph(*given), forward(*given))
    with pytest.raises(UnrecordableError, match="for 37 tokens and false for"):
        record(lambda x, p: x if x.shape[0] > 8 else -x, *arguments(TOKENS), MOST, MOST)


@torch.no_grad()
def test_what_a_module_asks_is_about_one_sequence():
    model = Model()
    mask = torch.ones(512, 512)

    def forward(ids, positions):
        tokens = ids.shape[0]
        assert tokens <= 512
        mask[:tokens, :tokens].bool()  # for an attention call, which does not take it
        return model(ids, positions)

    graph = record(forward, *arguments(TOKENS), 512, MOST)
    found = graph(*arguments(MOST))
    assert torch.equal(found, model(*arguments(MOST)))
    with pytest.raises(UnrecordableError, match="false for 513"):
        record(forward, *arguments(TOKENS), 513, MOST)


@torch.no_grad()
def test_what_operators_want_holds_for_whole_steps():
    model = Model()
    table = torch.randn(512, 8)

    def forward(ids, positions):
        return model(ids, positions) + table[: ids.shape[0]]

    record(forward, *arguments(TOKENS), 512, 512)
    with pytest.raises(UnrecordableError, match="false for 513"):
        record(forward, *arguments(TOKENS), 512, MOST)


@torch.no_grad()
def test_new_data_of_a_tensor_are_refused():
    """As Megatron has them, where a result may not be a view."""
    model = Model()

    def forward(ids, positions):
        x = model(ids, positions)
        out = torch.empty_like(x)
        out.data = x.data
        return out

    with pytest.raises(
        UnrecordableError, match=r"at .*test_recording.py:\d+: out.data"
    ):
        record(forward, *arguments(TOKENS), MOST, MOST)


def test_examples_are_as_what_a_step_has():
    ids = example(torch.ones(5, dtype=torch.int64), 0)
    assert ids.tolist() == [0] * TOKENS
    embeddings = example(torch.ones(5, 3, dtype=torch.bfloat16), 0)
    assert embeddings.shape == (TOKENS, 3) and embeddings.dtype == torch.bfloat16
    positions = example(torch.ones(3, 5, dtype=torch.int64), -1)  # of several axes
    assert positions.tolist() == [list(range(TOKENS))] * 3


@torch.no_grad()
def test_digests_tell_graphs_apart_and_not_values():
    def digest_of(model, dtype=torch.float32):
        return digest(record(model.to(dtype), *arguments(TOKENS), MOST, MOST))

    class Other(Model):
        def forward(self, ids, positions):
            return super().forward(ids, positions).relu()

    assert digest_of(Model()) == digest_of(Model())
    others = [digest_of(Other()), digest_of(Model(), torch.bfloat16)]
    assert len({digest_of(Model()), *others}) == 3
