# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Updates while an engine serves: running requests, servers, failures."""

from __future__ import annotations

import asyncio
import copy
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from servers import tiny_server, tiny_servers
from tiny_model import TinyModel, greedy, trained_model

from vllm import LLM, AsyncEngineArgs, ModelRegistry, SamplingParams
from vllm.distributed.weight_sync import WeightSync
from vllm.model_validation import Thresholds, validate
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.mixed_weights import MixedWeightsError

pytestmark = pytest.mark.engine

PROMPT = [3, 1, 4, 1, 5]
TIMEOUT_S = 30
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 128,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 24,
}


def change(model: torch.nn.Module, seed: int, std: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)


def served(llm: LLM, count: int = 8) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, detokenize=False)
    outputs = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    return list(outputs[0].outputs[0].token_ids)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def llm(model_dir: Path) -> Iterator[LLM]:
    ModelRegistry.register_model("TinyModel", lambda c, p: TinyModel())
    engine = LLM(str(model_dir), **OPTIONS)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def assert_equal_logprobs(llm: LLM, model: torch.nn.Module) -> None:
    """The engine's log-probabilities are those of the module in memory."""
    llm.reset_prefix_cache()
    limits = Thresholds(max_logprob_diff=1e-4)
    report = validate(llm, model, [PROMPT, [7]], max_tokens=8, thresholds=limits)
    assert report.passed, report.to_json()


def test_updates_and_failures(llm: LLM) -> None:
    """What fails is said, and the weights before it serve on."""
    model = trained_model()
    sync = WeightSync(model, llm, timeout=60)
    for seed in (1, 2):
        change(model, seed)
        assert sync.update() == seed
        assert served(llm) == greedy(model, PROMPT, 8)
    before = served(llm)
    change(model, 3)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match=r"not finite: lm_head\.weight"):
        sync.update()
    assert served(llm) == before
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 0
    assert sync.update() == 4
    assert served(llm) == greedy(model, PROMPT, 8)
    sync.close()

    # Another trainer attaches, with a module that differs.
    other = trained_model()
    other.lm_head = torch.nn.Linear(other.lm_head.in_features, 7)
    wrong = WeightSync(other, llm, timeout=60)
    with pytest.raises(ValueError, match=r"lm_head\.weight \(\[\d+, \d+\] in the eng"):
        wrong.update()
    # And one that does not.
    change(model, 5)
    unstaged = WeightSync(model, llm, staging="none", bucket_bytes=1000, timeout=60)
    assert unstaged.update() == 5
    assert served(llm) == greedy(model, PROMPT, 8)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(RuntimeError, match="not finite"):
        unstaged.update()
    with pytest.raises(Exception, match="mixture|update"):
        served(llm)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 0
    unstaged.update()
    assert served(llm) == greedy(model, PROMPT, 8)
    unstaged.close()


def test_caches_of_old_weights(
    in_process: None, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KV connector is told to forget, and what cannot be forgotten is an error."""
    model = trained_model()
    sync = WeightSync(model, llm, timeout=60)
    told = []
    reset = Scheduler.reset_connector_cache
    with monkeypatch.context() as patch:
        patch.setattr(
            Scheduler,
            "reset_connector_cache",
            lambda scheduler: told.append(True) or reset(scheduler),
        )
        sync.update()
        assert told
        patch.setattr(Scheduler, "reset_connector_cache", lambda scheduler: False)
        with pytest.raises(RuntimeError, match="of the old weights are still in its"):
            sync.update()
    change(model, 3)
    assert sync.update() == 3
    assert served(llm) == greedy(model, PROMPT, 8)
    sync.close()


def test_many_updates_and_sleep(llm: LLM) -> None:
    """Log-probabilities after 1, 10 and 100 updates, and after sleeps."""
    model = trained_model()
    sync = WeightSync(model, llm, timeout=60)
    for number in range(1, 101):
        change(model, number, std=0.2)
        assert sync.update() == number
        if number in (1, 10, 100):
            assert_equal_logprobs(llm, model)
    sync.close()

    # Versions go on from those of another trainer.
    sync = WeightSync(model, llm, timeout=60)
    for number, level in ((101, 1), (102, 2)):
        llm.sleep(level=level)
        change(model, number, std=0.2)
        assert sync.update(changed_only=True) == number  # it wakes the engine
        assert_equal_logprobs(llm, model)
    for level in (1, 2):
        llm.sleep(level=level)
        llm.wake_up()
        if level == 1:
            assert_equal_logprobs(llm, model)
    with pytest.raises(MixedWeightsError, match="sleep of level 2.*Load all weights"):
        served(llm)
    sync.update()
    assert_equal_logprobs(llm, model)
    sync.close()


async def check_modes(engine: AsyncLLM, model: torch.nn.Module) -> None:
    """A request that runs ends before the update, or is ended by it."""
    params = SamplingParams(temperature=0, max_tokens=100, detokenize=False)
    for number, mode in ((2, "wait"), (3, "abort")):
        sync = WeightSync(model, engine, mode=mode, timeout=60)
        before = copy.deepcopy(model)
        change(model, number)
        update = None
        async for output in engine.generate(
            {"prompt_token_ids": PROMPT}, params, request_id=mode
        ):
            completion = output.outputs[0]
            if update is None and len(completion.token_ids) >= 5:
                update = asyncio.create_task(asyncio.to_thread(sync.update))
        assert update is not None and await update == number
        tokens = list(completion.token_ids)
        # None of them is of the new weights.
        assert tokens == greedy(before, PROMPT, len(tokens))
        assert [span.version for span in completion.weight_versions] == [
            str(number - 1)
        ]
        assert completion.finish_reason == {"wait": "length", "abort": "abort"}[mode]
        assert (len(tokens) == 100) == (mode == "wait")
        async for output in engine.generate(
            {"prompt_token_ids": PROMPT}, params, request_id=f"after {mode}"
        ):
            completion = output.outputs[0]
        assert list(completion.token_ids) == greedy(model, PROMPT, 100)
        sync.close()


def test_a_running_request_goes_on_with_the_new_weights(model_dir: Path) -> None:
    """Each token is of one version, and computed from all tokens before it by that."""
    ModelRegistry.register_model("TinyModel", lambda c, p: TinyModel())
    old, model = trained_model(), trained_model()

    async def run() -> tuple[list[int], Any]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(model_dir), **OPTIONS)
        )
        sync = WeightSync(model, engine, mode="keep", timeout=60)
        with pytest.raises(RuntimeError, match=r"asyncio\.to_thread\(sync\.update\)"):
            sync.update()
        sync = WeightSync(model, engine, mode="keep", timeout=60)
        change(model, 1)
        params = SamplingParams(temperature=0, max_tokens=100, detokenize=False)
        update = None
        async for output in engine.generate(
            {"prompt_token_ids": PROMPT}, params, request_id="0"
        ):
            completion = output.outputs[0]
            if update is None and len(completion.token_ids) >= 5:
                update = asyncio.create_task(asyncio.to_thread(sync.update))
        assert update is not None
        await update
        sync.close()
        await check_modes(engine, copy.deepcopy(model))
        engine.shutdown()
        return list(completion.token_ids), completion.weight_versions

    tokens, versions = asyncio.run(run())
    assert len(tokens) == 100
    assert [span.version for span in versions] == ["default", "1"]
    first = versions[0].end
    assert 5 <= first < 100
    assert tokens[:first] == greedy(old, PROMPT, first)
    assert tokens[first:] == greedy(model, PROMPT + tokens[:first], 100 - first)


def answer(url: str) -> list[int]:
    return ask(url).json()["choices"][0]["token_ids"]


def ask(url: str) -> requests.Response:
    return requests.post(
        f"{url}/v1/completions",
        json={
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": 8,
            "temperature": 0,
            "return_token_ids": True,
        },
        timeout=60,
    )


def test_a_server(model_dir_with_tokenizer: Path, tmp_path_factory) -> None:
    logs = tmp_path_factory.mktemp("serve")
    model = trained_model()
    change(model, 1)
    wait = ("--additional-config", '{"require_weight_update": true}')
    with tiny_server(
        model_dir_with_tokenizer, logs, *wait, VLLM_SERVER_DEV_MODE="1"
    ) as url:
        refusal = ask(url)
        assert refusal.status_code == requests.codes.service_unavailable
        assert "require_weight_update" in refusal.text
        sync = WeightSync(model, [url], timeout=60)
        assert sync.update() == 1
        assert answer(url) == greedy(model, PROMPT, 8)
        assert requests.get(f"{url}/weight_info", timeout=9).json() == {
            "weight_version": "1"
        }
        sync.close()


TRAINER = """
import sys, torch
from tiny_model import trained_model
from vllm.distributed.weight_sync import WeightSync
model = trained_model()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
url, phase, staging = sys.argv[1:]
sync = WeightSync(model, [url], bucket_bytes=1000, staging=staging, timeout=60)
sync.update()
def die(frame, event, argument):
    global left
    if event == "call" and frame.f_code.co_name == phase:
        left -= 1
        if left < 0:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
left = 2 if phase == "_note" else 0  # until a bucket was sent
sys.setprofile(die)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
sync.update()
"""


@pytest.mark.slow
@pytest.mark.parametrize("staging", ["shard", "none"])
def test_a_trainer_that_is_killed(
    model_dir_with_tokenizer: Path, tmp_path_factory, staging: str
) -> None:
    """In each phase of an update. The next trainer's update is whole."""
    logs = tmp_path_factory.mktemp("serve")
    phases = ["_begin", "send", "_note", "_collect", "finish"]

    with tiny_server(model_dir_with_tokenizer, logs, VLLM_SERVER_DEV_MODE="1") as url:
        for phase in phases:
            killed = subprocess.run(
                [sys.executable, "-c", TRAINER, url, phase, staging],
                cwd=Path(__file__).parents[1],
                stderr=subprocess.PIPE,
                timeout=120,
            )
            assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
            if requests.get(f"{url}/is_paused", timeout=9).json()["is_paused"]:
                requests.post(f"{url}/resume", timeout=9)
            told = ask(url)
            if told.ok:  # whole weights of its first update
                assert staging == "shard" or phase in ("_begin", "send")
            else:
                assert staging == "none"
                assert told.status_code == requests.codes.service_unavailable
                assert "mixture of old and new ones" in told.text
            model = trained_model()
            change(model, len(phase))
            sync = WeightSync(model, [url], timeout=60)
            sync.update()
            assert answer(url) == greedy(model, PROMPT, 8), phase
            sync.close()


def kill(process: psutil.Popen, part: str) -> None:
    """SIGKILL a server, its engine core, or its worker."""
    parts = [process, *process.children(recursive=True)]
    name = {"server": "", "engine": "EngineCore", "worker": "Worker"}[part]
    found = [p for p in parts if name in " ".join(p.cmdline())]
    assert found, [p.cmdline() for p in parts]
    found[0].kill()


@pytest.mark.slow
def test_an_engine_that_is_killed(
    model_dir_with_tokenizer: Path, tmp_path_factory
) -> None:
    """In each phase of an update. It is named, and the trainer goes on."""
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    model = trained_model()
    logs = tmp_path_factory.mktemp("serve")
    wait = ("--additional-config", '{"require_weight_update": true}')
    # What is called when the engine dies: before the update, in it, at its end.
    cases = [
        ("server", None),
        ("worker", "send"),
        ("engine", "_collect"),
        ("worker", "finish"),
        ("server", "resume"),
    ]
    with tiny_server(model_dir_with_tokenizer, logs, **environment) as stays:
        version = 0
        for number, (part, phase) in enumerate(cases):
            folder = tmp_path_factory.mktemp(f"dies{number}")
            with tiny_servers(
                model_dir_with_tokenizer, folder, 1, *wait, **environment
            ) as servers:
                ((dies, process),) = servers.items()
                refusal = ask(dies)
                assert refusal.status_code == requests.codes.service_unavailable
                sync = WeightSync(model, [stays, dies], timeout=TIMEOUT_S)
                change(model, 2 * number)
                version = sync.update()
                assert answer(dies) == greedy(model, PROMPT, 8)

                change(model, 2 * number + 1)
                before = answer(stays)
                die_at(
                    sync, phase, lambda process=process, part=part: kill(process, part)
                )
                begin = time.monotonic()
                with pytest.raises(RuntimeError, match=re.escape(dies)) as error:
                    sync.update()
                assert time.monotonic() - begin < 2 * TIMEOUT_S
                committed = phase in ("finish", "resume")
                assert (stays in str(error.value)) is False
                expected = greedy(model, PROMPT, 8) if committed else before
                assert answer(stays) == expected, phase
                sync.close()
                # The trainer goes on with the engine that is left.
                sync = WeightSync(model, [stays], timeout=TIMEOUT_S)
                assert sync.update() == version + 1 + committed
                assert answer(stays) == greedy(model, PROMPT, 8)
                sync.close()
                process.kill()  # what is left of it may take long to end by itself
                process.wait()


def die_at(sync: WeightSync, phase: str | None, die: Callable[[], None]) -> None:
    """Call `die` when `phase` of an update begins, or now."""
    if phase is None:
        die()
        return
    owner: Any = {"send": sync._sender, "_collect": sync}.get(phase)
    if owner is None:
        owner = sync._engines._clients[1]
    action = getattr(owner, phase)

    def dying(*arguments: Any) -> Any:
        die()
        return action(*arguments)

    setattr(owner, phase, dying)


@pytest.mark.slow
def test_data_parallel_engines(
    model_dir_with_tokenizer: Path, tmp_path_factory
) -> None:
    """Both engines behind one server get each update."""
    logs = tmp_path_factory.mktemp("serve")
    model = trained_model()
    options = ("--data-parallel-size", "2")
    with tiny_server(
        model_dir_with_tokenizer, logs, *options, VLLM_SERVER_DEV_MODE="1"
    ) as url:
        sync = WeightSync(model, [url], timeout=60)
        for version, mode in ((1, "keep"), (2, "keep")):
            change(model, version)
            assert sync.update() == version, mode
            expected = greedy(model, PROMPT, 8)
            with ThreadPoolExecutor(8) as pool:  # more than one engine takes
                assert list(pool.map(answer, [url] * 8)) == [expected] * 8
        sync.close()


@pytest.mark.slow
def test_many_updates_leak_nothing(llm: LLM) -> None:
    """1,000 updates: no threads, descriptors or memory, on either side."""
    model = trained_model()
    sync = WeightSync(model, llm, timeout=60)
    for _ in range(50):
        sync.update()
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def used() -> list[tuple[int, int]]:
        return [(process.num_fds(), process.num_threads()) for process in processes]

    before = used()
    memory = sum(process.memory_info().rss for process in processes)
    for _ in range(1000):
        sync.update()
    grown = sum(process.memory_info().rss for process in processes) - memory
    assert used() == before
    assert grown < 32 << 20  # of a model of 0.6 MB
    sync.close()
