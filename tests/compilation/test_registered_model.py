# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import logging

import pytest
import torch
from tiny_model import TinyModel, greedy, trained_model
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from vllm import ModelRegistry, SamplingParams
from vllm.compilation.backends import split_graph
from vllm.compilation.piecewise_backend import get_fake_args_from_graph
from vllm.model_executor.parallel_context import ParallelContext

X = torch.ones(4, 2)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9]]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))


class Scaled(TinyModel):
    """Its forward depends on a plain attribute."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, positions) * self.scale


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
