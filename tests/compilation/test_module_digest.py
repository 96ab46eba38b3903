# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules that trace to different graphs have different digests, in every process."""

import collections
import dataclasses
import enum
import functools
import operator
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm.compilation.module_digest import UndeterminedError, module_digest
from vllm.compilation.registered_model import add_to_compile_hash
from vllm.config import CompilationMode

SCALE = 2.0
TABLE = {"scale": 1.0}


def holding(value: Any) -> nn.Module:
    module = nn.Identity()
    module.value = value
    return module


def digest(value: Any) -> str:
    return module_digest(holding(value))


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Plain:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@dataclasses.dataclass
class Data:
    scale: float
    names: list[str] = dataclasses.field(default_factory=list)


class Kind(enum.Enum):
    RELU = 1
    TANH = 2


def closure(value: Any) -> Callable:
    return lambda x: x * value


def inner_plus(value: int) -> Callable:
    source = f"def outer(x):\n    def inner(y): return y + {value}\n    return inner(x)"
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    return names["outer"]


def cycle(length: int) -> list:
    first: list = []
    last = first
    for _ in range(length - 1):
        last.append([])
        last = last[0]
    last.append(first)
    return first


def executed(operation: str) -> nn.Module:
    """A module whose class is in no file, as in a notebook."""
    names: dict[str, Any] = {"__name__": "__main__", "nn": nn, "torch": torch}
    exec(
        "class Cell(nn.Module):\n"
        f"    def forward(self, x): return torch.{operation}(x)\n",
        names,
    )
    return names["Cell"]()


def hooked(function: Callable) -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(function, with_kwargs=True)
    return module


def with_forward(function: Callable) -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = types.MethodType(function, module)
    return module


def keywords(*, scale: float = 1.0) -> float:
    return scale


def other_keywords(*, scale: float = 2.0) -> float:
    return scale


PAIRS: dict[str, tuple[Any, Any]] = {
    "torch builtins": (torch.tanh, torch.sigmoid),
    "functions": (F.gelu, torch.tanh),
    "global names": (lambda x: torch.relu(x), lambda x: torch.neg(x)),
    "methods": (lambda x: x.relu(), lambda x: x.neg()),
    "method descriptors": (torch.Tensor.relu, torch.Tensor.neg),
    "operators": (torch.ops.aten.relu.default, torch.ops.aten.neg.default),
    "packets": (torch.ops.aten.relu, torch.ops.aten.neg),
    "python operators": (operator.add, operator.sub),
    "ufuncs": (np.add, np.subtract),
    "nested code": (inner_plus(1), inner_plus(2)),
    "closures": (closure(1.0), closure(2.0)),
    "keyword defaults": (keywords, other_keywords),
    "bound methods": (Plain(1.0).method, Plain(2.0).method),
    "builtin methods": ([1].count, [2].count),
    "slots": (Slots(1.0), Slots(2.0)),
    "dataclasses": (Data(1.0), Data(2.0)),
    "enums": (Kind.RELU, Kind.TANH),
    "partial": (functools.partial(F.gelu, a=1), functools.partial(F.gelu, a=2)),
    "tensors": (torch.tensor([1.0]), torch.tensor([2.0])),
    "bfloat16": (torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]).bfloat16()),
    "arrays": (np.arange(3), np.arange(3) + 1),
    "deques": (collections.deque([1]), collections.deque([2])),
    "sets": ({"a", "b"}, {"a", "c"}),
    "orders": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "cycles": (cycle(2), cycle(3)),
    "signs of zero": (0.0, -0.0),
    "types of numbers": (1, True),
    "executed code": (executed("relu"), executed("neg")),
    "hooks": (hooked(lambda m, a, k, o: o + 1), hooked(lambda m, a, k, o: o + 2)),
    "instance forward": (
        with_forward(lambda self, x: x + 1),
        with_forward(lambda self, x: x + 2),
    ),
    "parametrizations": (
        nn.Linear(2, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ),
    "parameters": (nn.Linear(2, 2), nn.Linear(2, 2).double()),
    "tied weights": (
        nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]),
        nn.ParameterList([nn.Parameter(torch.ones(2))] * 2),
    ),
}


@pytest.mark.parametrize("one, other", PAIRS.values(), ids=PAIRS)
def test_what_differs_has_another_digest(one: Any, other: Any) -> None:
    assert digest(one) == digest(one)
    assert digest(one) != digest(other)


def test_equal_modules_share_a_digest() -> None:
    assert digest(closure(1.0)) == digest(closure(1.0))
    assert digest(executed("relu")) == digest(executed("relu"))
    assert digest({"a", "b", "c"}) == digest({"c", "b", "a"})
    assert digest(cycle(3)) == digest(cycle(3))
    # Values of parameters and buffers are inputs of the graph.
    assert module_digest(nn.Linear(2, 2)) == module_digest(nn.Linear(2, 2))
    norm = nn.BatchNorm1d(2)
    norm.running_mean += 1
    assert module_digest(norm) == module_digest(nn.BatchNorm1d(2))


def reads_globals(x: torch.Tensor) -> torch.Tensor:
    return times_scale(x) * TABLE["scale"]


def times_scale(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


def test_globals_are_read_however_deep(monkeypatch) -> None:
    before = digest(reads_globals)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    deep = digest(reads_globals)
    monkeypatch.setitem(TABLE, "scale", 2.0)
    assert len({before, deep, digest(reads_globals)}) == 3


def test_patches_of_installed_code_count(monkeypatch) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=8)
    attention = modeling.LlamaAttention(config, 0)
    digests = {module_digest(nn.Linear(2, 2)), module_digest(attention)}
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    digests.add(module_digest(nn.Linear(2, 2)))
    monkeypatch.undo()
    monkeypatch.setattr(modeling, "rotate_half", lambda x: x)  # by what forward calls
    digests.add(module_digest(attention))
    assert len(digests) == 4


def test_an_empty_cell_is_no_error() -> None:
    def function() -> Any:
        return later

    empty = digest(function)
    later = 1
    assert digest(function) != empty


def reflects(name: str) -> Any:
    return globals()[name]


@pytest.mark.parametrize(
    "value",
    [
        (i for i in range(3)),
        threading.Lock(),
        reflects,
        torch.eye(2).to_sparse(),
        {object()},
        sys.modules[__name__],
    ],
    ids=["generator", "lock", "reflection", "sparse", "identities", "module"],
)
def test_what_cannot_be_determined_is_said(value: Any) -> None:
    with pytest.raises(UndeterminedError, match="^value"):
        digest(value)
    module = nn.Sequential(holding(value))
    with pytest.raises(UndeterminedError, match=r"^0\.value"):
        module_digest(module)


def config_of(additional_config: Any) -> Any:
    mode = SimpleNamespace(mode=CompilationMode.VLLM_COMPILE)
    return SimpleNamespace(additional_config=additional_config, compilation_config=mode)


def test_the_key_has_the_digests_of_all_models() -> None:
    config = config_of({"user": 1})
    for module in (nn.Identity(), nn.Linear(2, 2), nn.Identity()):
        add_to_compile_hash(module, config)
    assert config.additional_config["user"] == 1
    assert len(config.additional_config["registered_modules"]) == 2


class Hashed:
    def compute_hash(self) -> str:
        return "user"


def test_an_additional_config_of_another_type_counts_as_well() -> None:
    hashes = []
    for module in (nn.Identity(), nn.Linear(2, 2), nn.Identity()):
        config = config_of(Hashed())
        add_to_compile_hash(module, config)
        assert isinstance(config.additional_config, Hashed)
        hashes.append(config.additional_config.compute_hash())
    assert hashes[0] == hashes[2] != hashes[1]


def test_nothing_is_found_again_of_what_cannot_be_determined() -> None:
    configs = [config_of({}), config_of({})]
    module = holding(threading.Lock())
    for config in configs:
        add_to_compile_hash(module, config)
    assert configs[0].additional_config != configs[1].additional_config


PROGRAM = """
import test_module_digest as t
print(*(t.digest(value) for pair in t.PAIRS.values() for value in pair))
"""


def test_digests_are_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=Path(__file__).parent,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop().split()) == 2 * len(PAIRS)
