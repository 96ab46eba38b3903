# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Updates of real engines by trainers whose weights are divided in other ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_models import (
    CONFIG,
    EXPERTS,
    FUSED,
    PLAIN,
    Stage,
    build_dtensor,
    build_megatron,
    build_parallel,
    build_plain,
    build_planned,
)
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from vllm import LLM, ModelRegistry
from vllm.distributed.weight_sync import WeightSync
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.plans import apply_plans
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_validation import validate

pytestmark = pytest.mark.engine

PROMPTS = [[1, 2, 3], list(range(40)), [7]]


def reference(seed: int) -> Stage:
    """The whole model, as it is after a step of training."""
    generator = torch.Generator().manual_seed(seed)
    model = build_plain(SimpleNamespace(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def change_a_few(model: nn.Module) -> None:
    """One of 50 elements, as it may be after a step in bfloat16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::50] += 0.25


def save(folder: Path, seed: int) -> None:
    config = CONFIG | {"architectures": ["SyncedModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(reference(seed).state_dict(), folder / "model.safetensors")


# ---- Trainers: what each of two ranks holds


def whole(context: ParallelContext) -> tuple[nn.Module, ParallelContext]:
    return build_plain(SimpleNamespace(**CONFIG)), ParallelContext()


def fsdp(context: ParallelContext) -> tuple[nn.Module, ParallelContext]:
    model = build_plain(SimpleNamespace(**CONFIG))
    for layer in model.layers.values():
        fully_shard(layer)
    return fully_shard(model), ParallelContext()


def stages(context: ParallelContext) -> tuple[nn.Module, ParallelContext]:
    place = ParallelContext(
        pipeline_parallel_size=2, pipeline_parallel_rank=dist.get_rank()
    )
    return Stage(SimpleNamespace(**CONFIG), place, PLAIN), place


def divided(
    build: Callable[..., nn.Module], context: ParallelContext
) -> tuple[nn.Module, ParallelContext]:
    hf_config = SimpleNamespace(**CONFIG)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    return apply_plans(build(config, context), config, context), context


TRAINERS: dict[str, Callable[..., tuple[nn.Module, ParallelContext]]] = {
    "whole": whole,
    "fsdp": fsdp,
    "stages": stages,
    "vllm layers": partial(divided, build_parallel),
    "dtensor": partial(divided, build_dtensor),
    "megatron": partial(divided, build_megatron),
    "plan": partial(divided, build_planned),
}
ENGINES = {
    "vllm layers": build_parallel,
    "dtensor": build_dtensor,
    "megatron": build_megatron,
    "plan": build_planned,
}


def engine_of_first_rank(folder: Path, layout: dict[str, int]) -> LLM | None:
    """An engine, on the first of torchrun's ranks; None on the others."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # torchrun's ranks unset it
    if dist.get_rank() > 0:
        return None
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_logprobs=-1,
        max_model_len=64,
        kv_cache_memory_bytes=32 << 20,
        enforce_eager=True,
        **layout,
    )


def update_from_each(
    folder: Path, engine: str, layout: dict[str, int], context: ParallelContext
) -> None:
    """On each of two ranks, of which the first has the engine."""
    ModelRegistry.register_model("SyncedModel", ENGINES[engine], supports_pp=True)
    llm = engine_of_first_rank(folder, layout)
    for seed, (name, build) in enumerate(TRAINERS.items(), start=1):
        expected = reference(seed)
        model, place = build(context)
        transport = "network" if seed % 2 else "auto"
        sync = WeightSync(
            model, llm, parallel_context=place, transport=transport, timeout=120
        )
        sent = []
        for _ in range(2):  # the second time only what changed
            state = expected.state_dict()
            if name == "stages":
                model.load_state_dict({key: state[key] for key in model.state_dict()})
            else:
                load_full_checkpoint(model, state.items(), place, name)
            sync.update(changed_only=True)
            sent.append(sync.sent_bytes)
            if len(sent) == 1:
                change_a_few(expected)
        assert 0 < sent[1] < sent[0] / 4 or sent == [0, 0], name
        sync.close()
        if llm is not None:
            report = validate(llm, logits_of(expected), PROMPTS, max_tokens=8)
            assert report.passed, f"{name}: {report.to_json()}"


def logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: model.lm_head(model(ids, torch.arange(len(ids))))


@pytest.mark.parametrize(
    ("engine", "layout"),
    [
        ("vllm layers", {"tensor_parallel_size": 2}),
        pytest.param("plan", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("dtensor", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("megatron", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(
            "vllm layers", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_every_trainer_updates_an_engine(
    tmp_path: Path, engine: str, layout: dict[str, int]
) -> None:
    """After each update the engine has the log-probabilities of that trainer."""
    save(tmp_path, seed=0)
    run_ranks(
        partial(update_from_each, tmp_path, engine, layout),
        tmp_path,
        tensor_parallel_size=2,
    )


# ---- Mixtures of experts, which vLLM's fused layer stacks

MIXTURE = CONFIG | EXPERTS | {"num_hidden_layers": 2}


def mixture(seed: int, context: ParallelContext | None = None) -> Stage:
    """With an expert-parallel context, only the experts of that rank."""
    generator = torch.Generator().manual_seed(seed)
    whole = Stage(SimpleNamespace(**MIXTURE), ParallelContext(), PLAIN)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.3, generator=generator)
    if context is None:
        return whole
    part = Stage(SimpleNamespace(**MIXTURE), context, PLAIN)
    state = whole.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    return part


def build_mixture(vllm_config: Any, context: ParallelContext) -> Stage:
    return Stage(vllm_config.model_config.hf_config, context, FUSED)


def update_mixture(
    folder: Path, tensor_parallel_size: int, context: ParallelContext
) -> None:
    """From trainers with whole experts, sharded ones, and some of them on each rank."""
    ModelRegistry.register_model("SyncedMixture", build_mixture)
    layout = {"tensor_parallel_size": tensor_parallel_size}
    llm = engine_of_first_rank(folder, layout)
    some = ParallelContext(expert_parallel_size=2, expert_parallel_rank=dist.get_rank())
    trainers = {
        "whole": lambda seed: mixture(seed),
        "fsdp": lambda seed: fully_shard(mixture(seed)),
        "some experts": lambda seed: mixture(seed, some),
    }
    for seed, (name, build) in enumerate(trainers.items(), start=1):
        model = build(seed)
        sync = WeightSync(model, llm, timeout=120)
        sync.update()
        sent = torch.tensor(sync.sent_bytes)
        dist.all_reduce(sent)
        sync.close()
        if llm is None:
            continue
        assert int(sent) == least_bytes(mixture(seed), tensor_parallel_size), name
        report = validate(llm, logits_of(mixture(seed)), PROMPTS, max_tokens=8)
        assert report.passed, f"{name}: {report.to_json()}"


def least_bytes(model: Stage, ranks: int) -> int:
    """One time what the engine's ranks divide, and on each what they do not."""
    divided = ("embedding.weight", "lm_head.weight", "o_proj.weight", "proj.weight")
    column = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    return sum(
        tensor.nbytes * (1 if name.endswith(divided + column) else ranks)
        for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "tensor_parallel_size", [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_fused_experts_are_updated(tmp_path: Path, tensor_parallel_size: int) -> None:
    """By trainers that hold single experts; no byte moves twice."""
    config = MIXTURE | {"architectures": ["SyncedMixture"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(mixture(0).state_dict(), tmp_path / "model.safetensors")
    run_ranks(
        partial(update_mixture, tmp_path, tensor_parallel_size),
        tmp_path,
        tensor_parallel_size=2,
    )
