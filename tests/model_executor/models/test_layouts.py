# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Each kind of model against its reference, in each parallel layout.

One checkpoint, saved by the plain model, serves all layouts. The reference is always
computed on the CPU. On a CPU more of them are compared by the examples, which
tests/examples runs.
"""

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layout_models import (
    CONFIG,
    EXPERTS,
    Stage,
    build_dtensor,
    build_fused,
    build_megatron,
    build_parallel,
    build_plain,
    build_planned,
)
from safetensors.torch import save_file

from vllm import AsyncEngineArgs, ModelRegistry, SamplingParams
from vllm.model_validation import ValidationReport, validate, validate_outputs
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.engine

PROMPTS = [[1, 2, 3], list(range(40)), [7]]
MAX_TOKENS = 16

# name: factory, what its config adds, the options that belong to it
KINDS = {
    "vllm layers": (build_parallel, {}, {}),
    "dtensor": (build_dtensor, {}, {}),
    "experts": (build_parallel, EXPERTS, {"enable_expert_parallel": True}),
    # Without expert parallelism, which vLLM's fused experts lack on a CPU.
    "fused experts": (build_fused, EXPERTS, {}),
    "megatron": (build_megatron, {}, {}),
    "plan": (build_planned, {}, {}),
}
LAYOUTS = {
    "alone": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4},
}
ON_CPU = [
    ("vllm layers", "alone"),
    ("fused experts", "tp2"),
    ("dtensor", "tp2-pp2"),
    ("experts", "tp2-pp2"),
]
# Parts of the layouts above.
MORE_ON_CPU = [
    ("dtensor", "alone"),
    ("experts", "alone"),
    ("fused experts", "alone"),
    ("dtensor", "tp2"),
    ("experts", "tp2"),
    ("dtensor", "pp2"),
    ("experts", "pp2"),
]
ON_GPUS = [
    ("vllm layers", "tp2"),
    ("dtensor", "tp2"),
    ("experts", "tp2"),
    ("megatron", "tp2"),
    ("plan", "tp2"),
    ("vllm layers", "pp2"),
    ("vllm layers", "tp2-pp2"),
    ("dtensor", "tp2-pp2"),
    ("experts", "tp2-pp2"),
    ("megatron", "tp2-pp2"),
    ("plan", "tp2-pp2"),
    ("vllm layers", "tp4"),
    ("dtensor", "tp4"),
    ("experts", "tp4"),
    ("megatron", "tp4"),
    ("plan", "tp4"),
]


def on_gpus(kind: str, layout: str):
    number = math.prod(LAYOUTS[layout].values())
    return pytest.param(
        kind, layout, marks=pytest.mark.gpu(number), id=f"gpus-{kind}-{layout}"
    )


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))


def register(kind: str, folder: Path) -> Stage:
    """Register a factory, save its checkpoint, and return the reference."""
    factory, added, _ = KINDS[kind]
    config = CONFIG | added
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LayoutModel"]})
    )
    generator = torch.Generator().manual_seed(0)
    reference = build_plain(SimpleNamespace(**config))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3, generator=generator)
    save_file(reference.state_dict(), folder / "model.safetensors")
    ModelRegistry.register_model("LayoutModel", factory, supports_pp=True)
    return reference


def logits_of(reference: Stage):
    return lambda ids: reference.lm_head(reference(ids, torch.arange(len(ids))))


def assert_equal(report: ValidationReport) -> None:
    """All greedy tokens agree, and max |Δ log p| is at most 1e-4."""
    assert report.passed, report.to_json()
    assert len(report.generated) == len(PROMPTS) * MAX_TOKENS


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *ON_CPU,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_ON_CPU),
        *(on_gpus(*case) for case in ON_GPUS),
    ],
)
def test_layout(start, tmp_path, kind, layout):
    if kind == "megatron":
        pytest.importorskip("megatron.core")
    reference = register(kind, tmp_path)
    options = LAYOUTS[layout] | KINDS[kind][2]
    llm = start(model=str(tmp_path), max_logprobs=-1, **options)
    assert_equal(validate(llm, logits_of(reference), PROMPTS, MAX_TOKENS))


def test_stages_of_any_length_have_global_names(start, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    reference = register("vllm layers", tmp_path)
    llm = start(model=str(tmp_path), max_logprobs=-1, **LAYOUTS["pp2"])
    assert_equal(validate(llm, logits_of(reference), PROMPTS, MAX_TOKENS))
    layers, names = zip(*llm.apply_model(layers_and_names), strict=True)
    assert layers == (["0", "1", "2"], ["3"])
    assert names == tuple(
        [f"trainable_attention.{index}" for index in stage] for stage in layers
    )


def layers_and_names(model):
    """The layers of a stage, and the names of its attention in the engine."""
    names = [
        layer.attention.attention.paged.layer_name for layer in model.layers.values()
    ]
    return list(model.layers), names


@pytest.mark.usefixtures("start")  # nothing may be left over
@pytest.mark.parametrize(
    "kind",
    [
        "experts",
        "megatron",
        pytest.param("vllm layers", marks=pytest.mark.slow),
        pytest.param("dtensor", marks=pytest.mark.slow),
        pytest.param("vllm layers", marks=pytest.mark.gpu(2), id="gpus-vllm layers"),
        pytest.param("experts", marks=pytest.mark.gpu(2), id="gpus-experts"),
    ],
)
def test_data_parallel(tmp_path, kind):
    """Ranks of a dense model serve alone; those of a mixture of experts in step."""
    if kind == "megatron":
        pytest.importorskip("megatron.core")
    reference = register(kind, tmp_path)
    options = AsyncEngineArgs(
        model=str(tmp_path),
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 24,
        gpu_memory_utilization=0.1,  # other tests may be on the same GPUs
        max_logprobs=-1,
        data_parallel_size=2,
        distributed_executor_backend="uni",  # fewer processes
        **KINDS[kind][2],
    )
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, logprobs=-1, detokenize=False
    )

    async def answer(engine: AsyncLLM, index: int):
        async for output in engine.generate(
            {"prompt_token_ids": PROMPTS[index]},
            params,
            request_id=str(index),
            data_parallel_rank=index % 2,
        ):
            last = output
        return last

    async def answer_all():
        engine = AsyncLLM.from_engine_args(options)
        try:
            return await asyncio.gather(
                *(answer(engine, index) for index in range(len(PROMPTS)))
            )
        finally:
            engine.shutdown()

    outputs = asyncio.run(answer_all())
    assert_equal(validate_outputs(outputs, logits_of(reference), MAX_TOKENS))
