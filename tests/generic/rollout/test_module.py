# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`VLLMModule` on engines of this program: one `LLM`, one `AsyncLLM`."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from soft_model import soft_model, worst_difference
from tiny_model import TinyModel

from vllm_generic.rollout import Episode, VLLMModule, answered_ahead

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3]]


class Policy(VLLMModule):
    """As users of ChatLearn write it."""

    def model_provider(self) -> TinyModel:  # type: ignore[override]
        assert self.model_args["layers"] == 2
        return TinyModel()


@pytest.fixture
def keys(model_dir_with_tokenizer: Path) -> dict[str, Any]:
    save_file(
        soft_model(0).state_dict(), model_dir_with_tokenizer / "model.safetensors"
    )
    return {
        "model": str(model_dir_with_tokenizer),
        "model_args": {"layers": 2},
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 24,
        "seq_length": 64,
        "max_new_tokens": 12,
        "n": 3,
        "timeout": 60,
    }


@pytest.fixture
def made(fork_server: None) -> Iterator[list[VLLMModule]]:
    """Modules to close; no process of an engine is there after that."""
    before = set(psutil.Process().children(recursive=True))
    modules: list[VLLMModule] = []
    yield modules
    for module in modules:
        module.close()
    gc.collect()
    left = set(psutil.Process().children(recursive=True)) - before
    left = {p for p in left if "resource_tracker" not in " ".join(p.cmdline())}
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive


def test_a_colocated_loop(keys: dict[str, Any], made: list[VLLMModule]) -> None:
    keys |= {
        "temperature": 0.7,
        "eval_temperature": 0,
        "stop_token_list": "t7;t1 t2",
        "prompt_logprobs": 1,
    }
    module = Policy(keys)
    made.append(module)
    with pytest.raises(RuntimeError, match=r"Call setup\(\) first"):
        module.generate({"input_ids": PROMPTS})
    module.setup()
    module.setup()  # a second call does nothing
    dataset = module.build_dataset(["t3 t1 t4", "t1 t5", {"prompt": "t9", "answer": 1}])
    data = dataset.collate(dataset.items[:2])
    model = soft_model(0)

    batch = module.forward_step(data)
    assert batch["prompt_index"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["str_prompts"][::3] == ["t3 t1 t4", "t1 t5"]
    assert len(set(batch["str_outputs"])) == 6  # n answers differ
    assert worst_difference(model, batch, 0.7) <= TOLERANCE
    sampled = batch["loss_mask"] > 0
    assert (batch["weight_versions"][sampled] == 0).all()
    assert (batch["weight_versions"][~sampled] == -1).all()
    for row, text in enumerate(batch["str_outputs"]):
        begin = len(batch["no_padded_query_ids"][row])
        words = [f"t{token}" for token in batch["all_tokens"][row, begin:].tolist()]
        assert text.strip() in " ".join(words)
        # The stop word is a token, which stays; the other stop string is none.
        assert "t7" not in words[: int(sampled[row].sum()) - 1]
        assert "t1 t2" not in text
    again = module.forward_step(data)
    assert torch.equal(again["all_tokens"], batch["all_tokens"])
    other = module.forward_step(data, iteration=1)
    assert not torch.equal(other["all_tokens"][:, :8], batch["all_tokens"][:, :8])

    # Prompts of a batch that is turned around give the same log-probabilities.
    held_out = module.eval_forward({"input_ids": PROMPTS})
    assert held_out["prompt_index"].tolist() == [0, 1, 2]
    begin, end = 3, int(held_out["lengths"][0])
    first = held_out["all_tokens"][0]
    greedy = module.eval_forward({"input_ids": PROMPTS[::-1]})
    assert greedy["all_tokens"][2, begin:end].tolist() == first[begin:end].tolist()

    # A trainer's step, while the engine has given its memory back.
    model = soft_model(1)
    module.offload()
    assert module.parameter_sync(model) == module.weight_version == 1
    batch = module.forward_step(data, iteration=2)
    assert worst_difference(model, batch, 0.7) <= TOLERANCE
    assert (batch["weight_versions"][batch["loss_mask"] > 0] == 1).all()
    # Another trainer's module: numbers go on.
    model = soft_model(2)
    assert module.parameter_sync(model) == 2
    batch = module.forward_step(data)
    assert (batch["weight_versions"][batch["loss_mask"] > 0] == 2).all()
    assert worst_difference(model, batch, 0.7) <= TOLERANCE

    # A trainer that goes on from a checkpoint repeats its next batch. Until its first
    # update, the engine's label is of another trainer's updates.
    resumed = Policy(keys, engine=module.engine.llm, weight_version=7)  # type: ignore[attr-defined]
    resumed.setup()
    same = resumed.forward_step(data)
    assert torch.equal(same["all_tokens"], batch["all_tokens"])
    assert int(same["weight_versions"].max()) == resumed.weight_version == 7
    assert resumed.parameter_sync(model) == 8
    assert int(resumed.forward_step(data)["weight_versions"].max()) == 8
    resumed.close()  # an engine that was given goes on
    assert module.parameter_sync(soft_model(2)) == 3
    batch = module.forward_step(data)

    # Nothing wrong reaches the engine, and nothing stays in it.
    with pytest.raises(ValueError, match="Prompt 1 of the batch has 64 tokens"):
        module.forward_step({"input_ids": [[1], [1] * 64]})
    with pytest.raises(ValueError, match="Prompt 0 of the batch has 0 tokens"):
        module.forward_step({"input_ids": [[]]})
    with pytest.raises(ValueError, match="no blocks_to_copy in a batch"):
        module.forward_step({"input_ids": [[1]], "blocks_to_copy": []})
    full = module.forward_step({"input_ids": [[1] * 63]})
    assert full["lengths"].tolist() == [64] * 3
    with pytest.raises(KeyboardInterrupt):
        interrupt_soon(lambda: [module.forward_step(data) for _ in range(1000)])
    after = module.forward_step(data)
    assert torch.equal(after["all_tokens"], batch["all_tokens"])


def interrupt_soon(call: Any) -> None:
    """Ctrl-C, while the main thread is in a call."""
    process, main = os.getpid(), threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    assert process == os.getpid()
    timer.start()
    call()


def test_an_asynchronous_loop(keys: dict[str, Any], made: list[VLLMModule]) -> None:
    keys["n"] = 2
    module = Policy(keys | {"asynchronous": True})
    made.append(module)
    before = set(psutil.Process().children(recursive=True))
    module.setup()
    model = soft_model(0)
    data: dict[str, Any] = {"input_ids": PROMPTS, "prompt_index": [0, 1, 2]}
    batch = module.forward_step(data)
    assert worst_difference(model, batch) <= TOLERANCE
    assert torch.equal(module.forward_step(data)["all_tokens"], batch["all_tokens"])

    # Episodes: two turns, with something given between them.
    async def play(episode: Episode) -> int:
        turn = await episode.sample(max_tokens=4)
        episode.give("t100 t101")
        episode.give([102])
        await episode.sample(max_tokens=3)
        return turn.token_ids[0]

    rollouts = module.run_episodes(play, data, timeout=60)
    assert worst_difference(model, rollouts) <= TOLERANCE
    for row, first in enumerate(rollouts["results"]):
        begin = len(rollouts["no_padded_query_ids"][row])
        tokens = rollouts["all_tokens"][row, begin : begin + 10].tolist()
        assert tokens[0] == first and tokens[4:7] == [100, 101, 102]
        mask = rollouts["loss_mask"][row, begin : begin + 10].tolist()
        assert mask == [1] * 4 + [0] * 3 + [1] * 3
    assert len(rollouts["results"]) == 6
    same = module.run_episodes(play, data)
    assert torch.equal(same["all_tokens"], rollouts["all_tokens"])

    # Ahead of the trainer: tokens are at most so many updates behind.
    module.parameter_sync(model)
    base, seen = module.weight_version, []
    batches = [data] * 6
    for step, (given, answered) in enumerate(
        answered_ahead(module, batches, max_versions_behind=2)
    ):
        assert given is data
        versions = answered["weight_versions"][answered["loss_mask"] > 0]
        behind = module.weight_version - versions
        assert int(behind.min()) >= 0 and int(behind.max()) <= 2
        seen.append(int(behind.max()))
        assert module.weight_version == base + step
        module.parameter_sync(model)
    assert len(seen) == 6 and max(seen) > 0
    # The trainer makes more updates than that: answered again.
    loop = answered_ahead(module, batches, max_versions_behind=1)
    next(loop)
    for _ in range(5):
        module.parameter_sync(model)
    _, answered = next(loop)
    versions = answered["weight_versions"][answered["loss_mask"] > 0]
    assert (versions == module.weight_version).all()
    loop.close()

    # An interrupted call ends its requests, and the next one works.
    with pytest.raises(KeyboardInterrupt):
        interrupt_soon(lambda: [module.forward_step(data) for _ in range(1000)])
    assert worst_difference(model, module.forward_step(data)) <= TOLERANCE

    # The engine is killed in the middle of a batch.
    busy = module.begin_step({"input_ids": [[1, 2]] * 256})
    for process in set(psutil.Process().children(recursive=True)) - before:
        process.kill()
    with pytest.raises(RuntimeError, match=r"Prompt \d+ of the batch: No engine is l"):
        busy.result(30)
    with pytest.raises(RuntimeError, match=r"Prompt \d of .*: No engine is left"):
        module.forward_step(data)


class Recorder:
    """An engine that only notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def sleep(self, level: int) -> None:
        self.asked.append(level)

    def wake_up(self, tags: list[str]) -> None:
        self.asked += tags

    def generate(self, requests: list[Any]) -> list[Any]:
        self.asked.append(len(requests))
        return []


class Recorded(VLLMModule):
    def setup(self) -> None:
        self._engine = self.recorder = Recorder()  # type: ignore[assignment]
        self._seq_length = 64


def test_what_sleeps_is_woken_when_it_is_needed() -> None:
    module = Recorded({"offload_level": 2})
    module.setup()
    module.offload()
    module.offload()
    module.onload(["weights"])
    module.onload(["weights"])
    module.generate({"input_ids": PROMPTS})
    assert module.recorder.asked == [2, "weights", "kv_cache", 3]
    awake = Recorded({"offload_level": 0})
    awake.setup()
    awake.offload()
    assert awake.recorder.asked == []


def test_episodes_need_an_asynchronous_engine() -> None:
    async def play(episode: Episode) -> None:
        await asyncio.sleep(0)

    module = Recorded({})
    module.setup()
    with pytest.raises(RuntimeError, match="Set asynchronous: true, engine_urls or"):
        module.run_episodes(play, {"input_ids": PROMPTS})
    with pytest.raises(ValueError, match="max_versions_behind is -1"):
        next(answered_ahead(module, [], max_versions_behind=-1))
