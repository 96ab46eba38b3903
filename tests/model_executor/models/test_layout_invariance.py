# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The batch-invariant mode: engines and trainers in other layouts have equal bits.

Every engine is compared with three trainers: a plain module in one process, the same
module under FSDP2 in two, and vLLM's parallel layers at TP=2. Layers are compared as
modules by tests/distributed/test_layout_invariance.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layout_models import (
    CONFIG,
    EXPERTS,
    PlannedStage,
    build_dtensor,
    build_megatron,
    build_parallel,
    build_plain,
    build_planned,
)
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.layers.trainable_attention import packed_sequences
from vllm.model_executor.layers.trainable_experts import (
    TrainableExperts,
    recorded_routing,
)
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.callable_model.logits import logits_function
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.platforms import current_platform
from vllm.training.batch_invariance import batch_invariant, token_log_probs
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.validation.first_difference import first_difference

pytestmark = pytest.mark.engine

PREFIX = list(range(1, 40))  # longer than a block of the cache
PROMPTS = [[*PREFIX, *range(60, 80)], [5], [*PREFIX, 99], [3, 1, 4, 1, 5] * 11]
NEW_TOKENS = 20
BF16, FP32 = torch.bfloat16, torch.float32
COMPILED = {"enforce_eager": False}
# Blocks for one and a half of three requests, so that some are preempted.
SMALL_CACHE = {"block_size": 32, "num_gpu_blocks_override": 6}

# name: dtype, factory, options of the engine
ENGINES = {
    "tp1-compiled-small-cache": (BF16, build_plain, COMPILED | SMALL_CACHE),
    "pp2": (BF16, build_parallel, {"pipeline_parallel_size": 2}),
    "experts-spread": (
        BF16,
        build_parallel,
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ),
}
MORE_ENGINES = {
    "tp1-compiled-small-cache-float32": (FP32, build_plain, COMPILED | SMALL_CACHE),
    "tp2-compiled": (BF16, build_parallel, {"tensor_parallel_size": 2} | COMPILED),
    "tp2-compiled-float32": (
        FP32,
        build_parallel,
        {"tensor_parallel_size": 2} | COMPILED,
    ),
    "tp2-pp2": (
        BF16,
        build_parallel,
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ),
    "pp2-float32": (FP32, build_parallel, {"pipeline_parallel_size": 2}),
    "tp4": (BF16, build_parallel, {"tensor_parallel_size": 4}),
    "plan-tp2": (BF16, build_planned, {"tensor_parallel_size": 2}),
    "dtensor-tp2": (BF16, build_dtensor, {"tensor_parallel_size": 2}),
    # Megatron adds biases to what it has rounded to bfloat16.
    "megatron-tp2-float32": (FP32, build_megatron, {"tensor_parallel_size": 2}),
    "experts-tp1": (BF16, build_plain, {}),
    "experts-tp2": (BF16, build_parallel, {"tensor_parallel_size": 2}),
    "experts-tp2-pp2-float32": (
        FP32,
        build_parallel,
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ),
}


def checkpoint(folder: Path, dtype: torch.dtype, experts: bool):
    """The trainer's module, whose weights are saved in `folder`."""
    config = CONFIG | {"architectures": ["LayoutModel"], "dtype": str(dtype)[6:]}
    if experts:
        config |= EXPERTS | {"trainable_experts": True}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    model = build_plain(SimpleNamespace(**config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    save_file(model.state_dict(), folder / "model.safetensors")
    return told(model)


def told(model):
    """A whole module, which is told what engines divide."""
    experts = any(isinstance(part, TrainableExperts) for part in model.modules())
    plan = {
        name: style
        for name, style in PlannedStage.tp_plan.items()
        if not (experts and "mlp" in name)  # experts know it
    }
    return sum_as_divided(model, plan)


def build_whole(vllm_config, parallel_context):
    return told(build_plain(vllm_config.model_config.hf_config))


def served(llm, temperature: float, prompt_logprobs: int | None):
    params = SamplingParams(
        temperature=temperature,
        max_tokens=NEW_TOKENS,
        logprobs=0,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
        ignore_eos=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return llm.generate(prompts, params, use_tqdm=False)


def serve(llm) -> list[tuple[list[int], list[float]]]:
    """Tokens, and the log-probabilities that the engine gave, of the last of them.

    Greedy with those of the prompt, which read no prefix cache, and sampled without.
    """
    results = []
    for output in served(llm, 0.0, 0) + served(llm, 1.0, None):
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        entries = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
        last = ids[-len(entries) :]
        values = [e[i].logprob for i, e in zip(last, entries, strict=True)]
        results.append((ids, values))
    return results


def recompute(model, logits_of, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of every token but the first, by one packed forward."""
    device = current_platform.device_type
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.tensor(sum(sequences, []), device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    with packed_sequences(offsets):
        logits = logits_of(model(ids, positions))[..., : CONFIG["vocab_size"]]
    log_probs = token_log_probs(logits[:-1], ids[1:])
    return [
        part[: n - 1]
        for part, n in zip(
            log_probs.tensor_split(offsets[1:-1].tolist()), lengths, strict=True
        )
    ]


def assert_equal(results, recomputed: list[torch.Tensor], trainer: str) -> None:
    for (_, values), found in zip(results, recomputed, strict=True):
        assert found[-len(values) :].tolist() == values, trainer


def train_in_parallel(context) -> None:
    """FSDP2, and vLLM's layers at TP=2: the same two processes, one after the other."""
    folder = Path.cwd()
    results = json.loads((folder / "results.json").read_text())
    hf_config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    dtype = getattr(torch, hf_config.dtype)
    weights = load_file(folder / "model.safetensors")
    device = current_platform.device_type
    rank = context.tensor_parallel_rank
    with set_default_torch_dtype(dtype), batch_invariant():
        model = build_plain(hf_config).to(device)
        model.load_state_dict(weights)
        told(model)
        mesh = init_device_mesh(device, (2,))
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        # The head is called by itself, so it has a unit of its own.
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = results[rank::2]  # each rank has its own batch
        recomputed = recompute(model, model.lm_head, [ids for ids, _ in mine])
        torch.cat(recomputed).mean().backward()
        assert_equal(mine, recomputed, "FSDP2")
        norms = [parameter.grad.norm() for parameter in model.parameters()]
        assert all(float(norm.full_tensor()) < 1e3 for norm in norms)

        config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
        model = build_parallel(config, context).to(device)
        load_full_checkpoint(model, weights.items(), context)
        model.requires_grad_(True)
        logits_of = logits_function("", model, CONFIG["vocab_size"], 2)
        recomputed = recompute(model, logits_of, [ids for ids, _ in results])
        assert_equal(results, recomputed, "TP=2")


def compare(llm, model, folder: Path, monkeypatch) -> None:
    """What an engine gives, with each trainer."""
    results = serve(llm)
    (folder / "results.json").write_text(json.dumps(results))
    sequences = [ids for ids, _ in results]
    with batch_invariant(), torch.no_grad():
        assert_equal(results, recompute(model, model.lm_head, sequences), "packed")
        alone = [recompute(model, model.lm_head, [ids])[0] for ids in sequences]
        assert_equal(results, alone, "one sequence at a time")
    monkeypatch.chdir(folder)
    (folder / "ranks").mkdir()
    run_ranks(train_in_parallel, folder / "ranks", 2)


def compare_routing(llm, model) -> None:
    """Of a prompt that is one step; each rank and stage has the trainer's."""
    prompt = PROMPTS[0][:30]
    llm.reset_prefix_cache()
    llm.apply_model(start_recording)
    params = SamplingParams(max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    stages = llm.apply_model(stop_recording)
    with batch_invariant(), torch.no_grad(), recorded_routing(model) as expected:
        model(torch.tensor(prompt), torch.arange(len(prompt)))
    assert set().union(*stages) == expected.keys()
    for stage in stages:
        for layer_id, chosen in stage.items():
            assert torch.equal(chosen, expected[layer_id]), layer_id


def start_recording(model) -> None:
    recording = recorded_routing(model)
    model.__dict__["recording"] = (recording, recording.__enter__())


def stop_recording(model) -> dict[int, torch.Tensor]:
    recording, routing = model.__dict__.pop("recording")
    recording.__exit__(None, None, None)
    return routing


@pytest.fixture
def engine(start, tmp_path, monkeypatch):
    """Starts an engine of a dtype, and returns it with the trainer's module."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")

    def start_engine(dtype, build, options, experts=False):
        model = checkpoint(tmp_path, dtype, experts).to(current_platform.device_type)
        build = build_whole if build is build_plain else build
        ModelRegistry.register_model("LayoutModel", build, supports_pp=True)
        options = {
            "model": str(tmp_path),
            "dtype": str(dtype)[6:],
            "max_num_batched_tokens": 32,  # prompts are computed in chunks
            "max_num_seqs": 3,
            "block_size": 32,
            "disable_log_stats": False,
        } | options
        return start(**options), model

    return start_engine


def counted(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.parametrize(
    "dtype", [BF16, pytest.param(FP32, marks=pytest.mark.slow)], ids=str
)
def test_an_engine_on_two_ranks(dtype, engine, tmp_path, monkeypatch) -> None:
    llm, model = engine(dtype, build_parallel, {"tensor_parallel_size": 2})
    compare(llm, model, tmp_path, monkeypatch)
    assert counted(llm, "vllm:prefix_cache_hits") > 0
    with batch_invariant(), torch.no_grad():
        assert first_difference(llm, model, PROMPTS[0][:30]) is None
        # A bias that is not the engine's: the module is named, not those after it.
        model.layers["2"].mlp.down.bias[3] += 0.25
        difference = first_difference(llm, model, PROMPTS[0][:30])
    assert difference is not None and difference.name == "layers.2.mlp.down"
    assert 0 < difference.differing <= 1 / CONFIG["hidden_size"]


@pytest.mark.parametrize(
    "case",
    [*ENGINES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_ENGINES)],
)
def test_other_engines(case, engine, tmp_path, monkeypatch) -> None:
    """Stages, compiled code, preemption, and layers of other libraries."""
    if "megatron" in case:
        pytest.importorskip("megatron.core")
    dtype, build, options = (ENGINES | MORE_ENGINES)[case]
    experts = "experts" in case
    llm, model = engine(dtype, build, options, experts)
    compare(llm, model, tmp_path, monkeypatch)
    if "small-cache" in case:
        assert counted(llm, "vllm:num_preemptions") > 0
    if "compiled" in case:
        assert all(llm.apply_model(is_compiled))
    if experts:
        compare_routing(llm, model)


def is_compiled(model) -> bool:
    return model.compiled
