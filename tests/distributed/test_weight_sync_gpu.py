# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Updates on GPUs: under CUDA graphs, by CUDA IPC, by NCCL, and of engines that sleep.

What an engine answers after an update is compared with what it answers after vLLM's
`reload_weights` of a file with the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layout_models import CONFIG, PLAIN, Stage
from safetensors.torch import save_file

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed.weight_sync import WeightSync
from vllm.model_executor.parallel_context import ParallelContext
from vllm.v1.engine.mixed_weights import MixedWeightsError

pytestmark = [pytest.mark.engine]

PROMPTS = [[1, 2, 3], list(range(40)), [7]]
# Decode steps replay CUDA graphs; compiling would take most of the time.
OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "max_num_seqs": 8,
    "max_model_len": 128,
}
Answers = tuple[list[list[int]], list[float]]


def build(vllm_config: Any, context: ParallelContext) -> Stage:
    return Stage(vllm_config.model_config.hf_config, ParallelContext(), PLAIN)


class Trainer:
    """A model in float32 on one GPU, and files with two versions of its weights."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.model = Stage(SimpleNamespace(**CONFIG), ParallelContext(), PLAIN)
        config = CONFIG | {"architectures": ["Synced"]}
        for name in ("old", "new"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(config))
            self.step(name)
            weights = {k: v.bfloat16() for k, v in self.model.state_dict().items()}
            save_file(weights, folder / name / "model.safetensors")
        self.model.to(device)

    def step(self, name: str) -> None:
        """Give the model the weights of a file, with bits that bf16 drops."""
        generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
        with torch.no_grad():
            for parameter in self.model.parameters():
                value = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(value)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[[str], Trainer]:
    ModelRegistry.register_model("Synced", build)
    return lambda device: Trainer(tmp_path, device)


def answers(llm: LLM) -> Answers:
    """Greedy tokens and their log-probabilities, by prompt."""
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    completions = [
        output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)
    ]
    tokens = [list(completion.token_ids) for completion in completions]
    logprobs = [
        step[token].logprob
        for completion in completions
        for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return tokens, logprobs


def both(llm: LLM, trainer: Trainer) -> dict[str, Answers]:
    """What an engine answers with each version; it ends with the old one."""
    found = {"old": answers(llm)}
    for name in ("new", "old"):
        path = str(trainer.folder / name)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        if name == "new":
            found[name] = answers(llm)
    assert found["old"][0] != found["new"][0]
    return found


def assert_same(found: Answers, expected: Answers) -> None:
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [False, True])
def test_one_gpu(start: Callable[..., LLM], trainer: Any, processes: bool) -> None:
    """In the engine's process, and from another one that shares the GPU."""
    trainer = trainer("cuda")
    llm = start(
        processes=processes,
        model=str(trainer.folder / "old"),
        enable_sleep_mode=True,
        **OPTIONS,
    )
    expected = both(llm, trainer)
    for staging in ("shard", "none"):
        sync = WeightSync(trainer.model, llm, staging=staging, timeout=60)
        for name in ("new", "old"):
            trainer.step(name)
            sync.update()
            assert_same(answers(llm), expected[name])
        for level, name in ((1, "new"), (2, "old"), (2, "new")):
            llm.sleep(level=level)
            trainer.step(name)
            sync.update()  # wakes the weights, and afterwards the KV cache
            assert not llm.llm_engine.is_sleeping()
            assert_same(answers(llm), expected[name])
        llm.sleep(level=2)
        llm.wake_up()
        with pytest.raises(MixedWeightsError, match="sleep of level 2"):
            answers(llm)
        sync.update()
        assert_same(answers(llm), expected["new"])
        sync.close()


def in_use() -> int:
    """Bytes of the GPU that are in use by any process."""
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.gpu
def test_an_engine_that_sleeps_keeps_no_staging(
    start: Callable[..., LLM], trainer: Any
) -> None:
    """After updates a sleep frees as much as before the first one."""
    trainer = trainer("cuda")
    llm = start(
        processes=True,
        model=str(trainer.folder / "old"),
        enable_sleep_mode=True,
        **OPTIONS,
    )
    sync = WeightSync(trainer.model, llm, timeout=60)
    used = []
    for _ in range(4):
        sync.update()
        llm.sleep(level=2)
        used.append(in_use())
    assert max(used[1:]) <= used[0] + (32 << 20)
    sync.update()
    sync.close()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["auto", "network"])
def test_from_one_gpu_to_another(
    start: Callable[..., LLM], trainer: Any, transport: str
) -> None:
    """By CUDA IPC, and by NCCL as between machines; also after a failure."""
    torch.cuda.set_device(1)
    try:
        trainer = trainer("cuda:1")
        llm = start(processes=True, model=str(trainer.folder / "old"), **OPTIONS)
        expected = both(llm, trainer)
        sync = WeightSync(
            trainer.model, llm, transport=transport, bucket_bytes=1 << 16, timeout=60
        )
        for name in ("new", "old", "new"):
            trainer.step(name)
            sync.update(changed_only=True)
            assert_same(answers(llm), expected[name])
        sync.update(changed_only=True)
        if transport == "network":
            assert sync.sent_bytes == 0
        weight = next(trainer.model.parameters())
        with torch.no_grad():
            weight.view(-1)[3] = float("nan")
        with pytest.raises(RuntimeError, match="not finite"):
            sync.update(changed_only=True)
        assert_same(answers(llm), expected["new"])
        trainer.step("old")
        sync.update(changed_only=True)
        assert_same(answers(llm), expected["old"])
        sync.close()
    finally:
        torch.cuda.set_device(0)
