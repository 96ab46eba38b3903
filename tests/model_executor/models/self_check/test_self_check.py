# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which models the self-check lets start, and what it says of the others."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layout_models import CONFIG, PLAIN, PlannedStage, build_plain
from safetensors.torch import save_file
from tiny_model import HEAD_DIM, HEADS, TinyBlock, TinyModel
from torch import nn

from vllm import LLM, ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.models.self_check import check, self_check
from vllm.model_executor.parallel_context import ParallelContext


class Limited(TinyModel):
    """With a window, a cap, and a block that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (HEADS, HEAD_DIM)
        self.layers[0].attention = TrainableAttention(*sizes, sliding_window=64)
        self.layers[1].attention = TrainableAttention(*sizes, logits_soft_cap=30.0)
        self.spare = TinyBlock()


def randomize(model: nn.Module) -> nn.Module:
    """Weights with which every layer matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0
            parameter.normal_(std=std, generator=generator)
    return model


def worker_of(llm: LLM) -> Any:
    """The worker of an engine in this process."""
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker


# ---- Faults, each of a module that works otherwise -----------------------------------


def token_shift(model: Any) -> str:
    def forward(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = model.embedding(input_ids) + model.positions(positions)
        x = x + F.pad(x, (0, 0, 1, 0))[:-1]
        for layer in model.layers:
            x = layer(x)
        return x

    model.forward = forward
    return "'layers.0.norm', a LayerNorm; what it receives differs already"


def positions_of_its_own(model: Any) -> str:
    forward = model.forward
    model.forward = lambda ids, positions: forward(ids, torch.arange(len(ids)))
    return "'positions', a Embedding; what it receives differs already"


def plain_attention(model: Any) -> str:
    layer = model.layers[1].attention
    attend = layer.forward

    def forward(*qkv: torch.Tensor) -> torch.Tensor:
        attend(*qkv)  # each call is counted
        q, k, v = (x.transpose(0, 1) for x in qkv)  # [heads, tokens, head_dim]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(0, 1)

    layer.forward = forward
    return "'layers.1.attention', a TrainableAttention; what it receives is equal"


def window_in_training_only(model: Any) -> str:
    model.layers[0].attention.sliding_window = 20
    return "'layers.0.attention', a TrainableAttention; what it receives is equal"


def no_cap_in_training(model: Any) -> str:
    model.layers[1].attention.logits_soft_cap = None
    model.layers[1].attention.scale *= 1.5
    return "'layers.1.attention', a TrainableAttention; what it receives is equal"


def state_of_one_request_for_all(model: Any) -> str:
    last: dict[str, torch.Tensor] = {}

    def forward(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = model.embedding(input_ids) + model.positions(positions)
        before = last.get("x", x[:1]) * (positions[0] > 0)
        last["x"] = x[-1:]
        x = x + torch.cat([before, x[:-1]])
        for layer in model.layers:
            x = layer(x)
        return x

    model.forward = forward
    return "'layers.0.norm', a LayerNorm; what it receives differs already"


FAULTS = [
    token_shift,
    positions_of_its_own,
    plain_attention,
    window_in_training_only,
    no_cap_in_training,
    state_of_one_request_for_all,
]


@pytest.mark.engine
def test_faults_are_found(
    start: Callable[..., LLM],
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_file(randomize(Limited()).state_dict(), model_dir / "model.safetensors")
    ModelRegistry.register_model("TinyModel", lambda config, context: Limited())
    llm = start()
    worker = worker_of(llm)
    model, config = worker.get_model(), worker.vllm_config
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with set_current_vllm_config(config), torch.no_grad():
        layers = [layer.attention for layer in model.module.layers]
        before = [(vars(x).copy(), x.paged, x.paged.layer_name) for x in layers]
        assert check._Check(model, worker.model_runner).run() is None
        assert "never calls the attention layers spare.attention" in caplog.text
        # The small window and the low cap are gone.
        names = config.compilation_config.static_forward_context
        for layer, (values, paged, name) in zip(layers, before, strict=True):
            assert vars(layer).keys() == values.keys()
            assert layer.sliding_window == values["sliding_window"]
            assert layer.logits_soft_cap == values["logits_soft_cap"]
            assert layer.paged is paged is names[name]

        for fault in FAULTS:
            saved = {part: vars(part).copy() for part in model.module.modules()}
            found = fault(model.module)
            with pytest.raises(RuntimeError, match="TinyModel would answer") as error:
                self_check(worker)
            assert found in str(error.value), fault.__name__
            assert "spare.attention are built and never called" in str(error.value)
            for part, values in saved.items():
                vars(part).clear()
                vars(part).update(values)

        # The own code of a module that is called otherwise.
        def full(ids: torch.Tensor, offset: int = 0) -> torch.Tensor:
            positions = torch.arange(len(ids)) + offset
            return model.module.lm_head(model.module(ids, positions))

        model.full_forward = full
        self_check(worker)
        model.full_forward = lambda ids: full(ids, offset=2)
        with pytest.raises(RuntimeError, match="would answer wrongly"):
            self_check(worker)
        # A window of its own code is met by a longer prompt.
        window = model.module.layers[0].attention
        assert check._Check(model, worker.model_runner)._longest() == 77
        model.full_forward = full
        self_check(worker)

        def full_without_window(ids: torch.Tensor) -> torch.Tensor:
            window.sliding_window = None
            try:
                return full(ids)
            finally:
                window.sliding_window = 64

        model.full_forward = full_without_window
        with pytest.raises(RuntimeError, match="'layers.0.attention'"):
            self_check(worker)
        monkeypatch.setattr(check.envs, "VLLM_MODEL_SELF_CHECK", False, raising=False)
        self_check(worker)
        monkeypatch.undo()

        def fails(ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("needs an engine")

        model.full_forward = fails
        reason = check._Check(model, worker.model_runner).run()
        assert reason == "its own forward fails: RuntimeError: needs an engine"


def build_shifted(config: Any, context: ParallelContext) -> nn.Module:
    model = PlannedStage(config.model_config.hf_config, ParallelContext(), PLAIN)
    # The last of four layers, which is on the second of two stages.
    model.layers["3"].mlp.register_forward_pre_hook(
        lambda mlp, args: F.pad(args[0], (0, 0, 1, 0))[:-1]
    )
    return model


@pytest.mark.engine
@pytest.mark.parametrize(
    "tensor, pipeline", [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)]
)
def test_all_ranks_refuse_together(
    start: Callable[..., LLM],
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensor: int,
    pipeline: int,
) -> None:
    config = CONFIG | {"architectures": ["Planned"]}
    (model_dir / "config.json").write_text(json.dumps(config))
    state = randomize(build_plain(SimpleNamespace(**CONFIG))).state_dict()
    save_file(state, model_dir / "model.safetensors")
    ModelRegistry.register_model("Planned", build_shifted, supports_pp=True)
    with pytest.raises(RuntimeError, match="'layers.3.mlp.up', a [^;]*; what it rec"):
        start(
            processes=True,
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
        )


@pytest.mark.engine
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sound_models_start_on_a_gpu(
    start: Callable[..., LLM],
    model_dir: Path,
    dtype: str,
) -> None:
    """vLLM's other model runner, and attention kernels that round otherwise."""
    save_file(randomize(Limited()).state_dict(), model_dir / "model.safetensors")
    ModelRegistry.register_model("TinyModel", lambda config, context: Limited())
    worker = worker_of(start(dtype=dtype))
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        run = check._Check(worker.get_model(), worker.model_runner)
        assert run.run() is None
        window_in_training_only(worker.get_model().module)
        with pytest.raises(RuntimeError, match="'layers.0.attention'"):
            run.run()
