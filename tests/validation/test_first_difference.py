# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which output differs first: of recorded ones, and of a stand-in for an engine."""

import pytest
import torch
from torch import nn

from vllm.validation.first_difference import (
    compare_outputs,
    first_difference,
    record_outputs,
)


class Scaled(nn.Module):
    """An operator that is not invariant: it depends on the number of rows."""

    def __init__(self, invariant: bool) -> None:
        super().__init__()
        self.invariant = invariant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.invariant else x * (1 + 1e-6 * (x.shape[0] % 2))


class Model(nn.Module):
    def __init__(self, invariant: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.scaled = Scaled(invariant)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.norm(self.blocks[0](x))
        return self.norm(self.blocks[1](self.scaled(x)))


def model(invariant: bool = True) -> Model:
    torch.manual_seed(0)
    return Model(invariant)


def recorded(module: nn.Module, ids: list[int]):
    with record_outputs(module) as outputs, torch.no_grad():
        module(torch.tensor(ids), torch.arange(len(ids)))
    return outputs


class Engine:
    """The calls of an `LLM` that a comparison makes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def reset_prefix_cache(self) -> None:
        pass

    def apply_model(self, function):
        return [function(self.module)]

    def generate(self, prompts, params, use_tqdm):
        assert params.max_tokens == 1
        ids = torch.tensor(prompts[0]["prompt_token_ids"])
        self.module(ids, torch.arange(len(ids)))


def test_names_are_in_the_order_of_calls() -> None:
    module = model()
    outputs = recorded(module, [1, 2, 3])
    assert list(outputs) == [
        *("embedding", "blocks.0", "norm", "scaled", "blocks.1", "norm (2)", "")
    ]
    assert not any(part._forward_hooks for part in module.modules())


def test_the_module_that_made_the_difference_is_named() -> None:
    """A later call of a module that is equal in its first call differs, too."""
    equal = first_difference(Engine(model()), model(), [1, 2, 3])
    assert equal is None
    difference = first_difference(Engine(model(invariant=False)), model(), [1, 2, 3])
    assert difference is not None
    assert difference.name == "scaled" and difference.shape == (3, 8)
    assert 0.5 < difference.differing <= 1 and 0 < difference.max_difference < 1e-4
    share, most = 100 * difference.differing, difference.max_difference
    assert str(difference) == (
        f"scaled [3, 8]: {share:.3g} % of the elements differ, by at most {most:.3g}"
    )


def test_a_batch_axis_and_a_tuple_do_not_matter() -> None:
    x = torch.randn(4, 8)
    assert compare_outputs({"a": [x[None]]}, {"a": [x]}) is None
    difference = compare_outputs({"a": [x, x]}, {"a": [x, x + 1]})
    assert difference is not None and difference.max_difference == pytest.approx(1)


def test_outputs_that_are_divided_are_named_and_not_compared() -> None:
    x = torch.randn(4, 8)
    difference = compare_outputs(
        {"norm": [x], "query": [x], "output": [x]},
        {"norm": [x], "query": [x[:, :4]], "output": [x + 1]},
    )
    assert difference is not None and difference.name == "output"
    assert difference.not_compared == ("query",)
    assert "before it, not compared: query" in str(difference)
    with pytest.raises(ValueError, match="No outputs can be compared"):
        compare_outputs({"query": [x]}, {"query": [x[:, :4]]})


def test_nan_and_infinity() -> None:
    x = torch.tensor([torch.nan, torch.inf, 1.0])
    assert compare_outputs({"a": [x]}, {"a": [x.clone()]}) is None
    difference = compare_outputs({"a": [x]}, {"a": [torch.ones(3)]})
    assert difference is not None and difference.differing == pytest.approx(2 / 3)
    assert difference.max_difference != difference.max_difference


def test_a_tolerance() -> None:
    expected = {"a": [torch.tensor([100.0, 1.0])]}
    actual = {"a": [expected["a"][0] + 0.5]}
    assert compare_outputs(expected, actual, 0.01) is None
    assert compare_outputs(expected, actual, 0.001) is not None
