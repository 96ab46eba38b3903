# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import TinyModel, greedy, trained_model
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from vllm import ModelRegistry, SamplingParams
from vllm.compilation.backends import split_graph
from vllm.compilation.piecewise_backend import get_fake_args_from_graph
from vllm.compilation.registered_model import (
    SeparateResidualPass,
    add_to_compile_hash,
)
from vllm.model_executor.parallel_context import ParallelContext

X = torch.ones(4, 2)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))


def digest(module: nn.Module) -> str:
    config = SimpleNamespace(additional_config={"user": 1})
    add_to_compile_hash(module, config)
    assert config.additional_config["user"] == 1
    return config.additional_config["registered_module"]


class Scaled(TinyModel):
    """Its forward depends on a plain attribute."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, positions) * self.scale


def with_closure(value: float) -> nn.Module:
    module = nn.Identity()
    module.function = lambda x: x * value
    return module


def test_a_sum_with_the_residual_is_no_part_of_the_product() -> None:
    down, biased = nn.Linear(8, 16, bias=False), nn.Linear(8, 16)
    norm = nn.RMSNorm(16)

    def layer(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x + down(y)
        return x, norm(x), norm(biased(y))

    def compile_with(**options: SeparateResidualPass) -> tuple:
        torch._dynamo.reset()
        options["fx_graph_cache"] = False
        compiled = torch.compile(layer, options=options)
        with torch.no_grad():
            return run_and_get_code(compiled, torch.ones(4, 16), torch.ones(4, 8))

    _, (code,) = compile_with()
    assert code.count("extern_kernels.addmm(") == 2
    outputs, (code,) = compile_with(post_grad_custom_post_pass=SeparateResidualPass())
    assert code.count("extern_kernels.addmm(") == 1  # with the bias
    for x, y in zip(outputs, layer(torch.ones(4, 16), torch.ones(4, 8)), strict=True):
        torch.testing.assert_close(x, y)


def test_equal_modules_share_compiled_code() -> None:
    assert digest(Scaled(1.0)) == digest(Scaled(1.0))
    assert digest(with_closure(1.0)) == digest(with_closure(1.0))


@pytest.mark.parametrize(
    "other",
    [Scaled(2.0), TinyModel(), Scaled(1.0).double(), nn.Sequential(Scaled(1.0))],
    ids=["attribute", "class", "dtype", "structure"],
)
def test_other_modules_do_not(other: nn.Module) -> None:
    assert digest(other) != digest(Scaled(1.0))


def test_variables_of_a_function_count() -> None:
    assert digest(with_closure(1.0)) != digest(with_closure(2.0))


def test_the_digest_is_the_same_in_every_process() -> None:
    program = (
        "from test_registered_model import Scaled, digest; print(digest(Scaled(1.0)))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop()) == 65


def tokens(llm) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=8, detokenize=False),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def wrapper_of(llm) -> nn.Module:
    return llm.apply_model(lambda model: model)[0]


@pytest.mark.engine
def test_what_is_compiled_is_the_module_that_was_built(
    start, monkeypatch, tmp_path
) -> None:
    # The same source and config.json twice, so that only the variable differs.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    reference = trained_model()
    for scale in (1.0, -1.0):
        ModelRegistry.register_model(
            "TinyModel", lambda c, p, scale=scale: Scaled(scale)
        )
        llm = start(enforce_eager=False)
        assert wrapper_of(llm).compiled
        scaled = Scaled(scale)
        scaled.load_state_dict(reference.state_dict())
        assert tokens(llm) == [greedy(scaled, prompt, 8) for prompt in PROMPTS]


class Untraceable(TinyModel):
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if float(positions.sum()) < 0:  # depends on data
            raise ValueError("negative positions")
        return super().forward(input_ids, positions)


def test_a_piece_that_switches_the_grad_mode_has_all_its_inputs() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.ops.aten.relu.default(x) * x

    graphs = []
    torch.compile(forward, backend=lambda graph, _: graphs.append(graph) or graph)(X)
    split, items = split_graph(graphs[0], ["aten::relu"])
    last = items[-1].graph
    first = next(iter(last.graph.nodes))
    assert first.op == "call_function"  # the switch, so the test is of this case
    inputs = get_fake_args_from_graph(last)
    assert len(inputs) == len(last.graph.find_nodes(op="placeholder")) == 2


@pytest.mark.engine
def test_what_cannot_be_traced_runs_eagerly(start, monkeypatch, caplog) -> None:
    ModelRegistry.register_model("TinyModel", lambda c, p: Untraceable())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    llm = start(enforce_eager=False)
    assert "TinyModel runs without torch.compile" in caplog.text
    reference = trained_model()
    assert tokens(llm) == [greedy(reference, prompt, 8) for prompt in PROMPTS]


def with_dtensors(parallel_context: ParallelContext) -> nn.Module:
    module = TinyModel()
    mesh = parallel_context.device_mesh()["tp"]
    return parallelize_module(module, mesh, {"layers.*.projection": ColwiseParallel()})


@pytest.mark.engine
def test_dtensors_are_not_compiled(start) -> None:
    ModelRegistry.register_model("TinyModel", lambda c, p: with_dtensors(p))
    llm = start(enforce_eager=False)
    assert wrapper_of(llm).do_not_compile
    reference = trained_model()
    assert tokens(llm) == [greedy(reference, prompt, 8) for prompt in PROMPTS]


@pytest.mark.engine
def test_compilation_can_be_declined(start) -> None:
    ModelRegistry.register_model(
        "TinyModel", lambda c, p: TinyModel(), supports_torch_compile=False
    )
    llm = start(enforce_eager=False)
    assert not hasattr(wrapper_of(llm), "compiled")
    reference = trained_model()
    assert tokens(llm) == [greedy(reference, prompt, 8) for prompt in PROMPTS]
