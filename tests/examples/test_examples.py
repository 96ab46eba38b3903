# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every example runs, at a small size, as a reader would start it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = "custom_model_training_to_inference.py"
MEGATRON = "offline_inference/custom_model_with_megatron.py"
PARALLELISM = "generic_model_parallelism.py"
PLANS = "plan_model/train.py"  # in test_plan_model.py
PARALLEL = "train_tensor_parallel.py"

SMALL = ["--num-prompts", "3", "--max-tokens", "12"]


def run(example: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return run_python(str(EXAMPLES / example), *SMALL, *args, **env)


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess:
    """Run a program to its end; it must leave no process behind."""
    process = subprocess.Popen(
        [sys.executable, *args],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # to find what it started
    )
    try:
        output, _ = process.communicate(timeout=400)
        deadline = time.monotonic() + 10
        while (left := session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, f"left over: {left}\n{output}"
    finally:
        for child in session(process.pid):
            child.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:  # it ended meanwhile
            continue
    return found


def test_every_example_is_run_here():
    scripts = {
        str(path.relative_to(EXAMPLES))
        for path in EXAMPLES.rglob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    # in files of their own
    beside = {"chain.py", "rl/grpo.py", "lora_service/two_adapters.py"}
    beside |= {"vision_language/train.py", "vision_language/ask.py"}
    beside |= {"token_shift.py", "draft_head.py"}
    assert scripts == {TRAINING, MEGATRON, PARALLELISM, PARALLEL, PLANS} | beside, (
        "run each example in tests/examples"
    )


@pytest.mark.engine
def test_training_to_inference(tmp_path):
    small = ["--train-seconds", "3", "--num-samples", "2"]
    result = run(TRAINING, *small, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert "PASSED" in result.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json"}
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["num_generated_tokens"] == 3 * 12


@pytest.mark.engine
@pytest.mark.parametrize("size", ["2", pytest.param("1", marks=pytest.mark.slow)])
def test_megatron(tmp_path, size):
    pytest.importorskip("megatron.core")
    result = run(
        MEGATRON,
        *("--tensor-parallel-size", size, "--pipeline-parallel-size", size),
        *("--train-steps", "4"),
        *("--output-dir", str(tmp_path), "--json", str(tmp_path / "report.json")),
    )
    assert result.returncode == 0, result.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["num_generated_tokens"] == 3 * 12
    assert report["rank_histogram"] == {"1": 3 * 12}


@pytest.mark.engine
@pytest.mark.parametrize("layout", ["2x1", pytest.param("2x2", marks=pytest.mark.slow)])
def test_every_way_to_parallelize(tmp_path, layout):
    pytest.importorskip("megatron.core")
    arguments = ("--layouts", layout, "--output-dir", str(tmp_path))
    # The processes of an engine are forked: they have imported vLLM already.
    few = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    few["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    result = run(PARALLELISM, *arguments, **few)
    assert result.returncode == 0, result.stdout
    rows = [line for line in result.stdout.splitlines() if "100% of 36" in line]
    assert len(rows) == 3 and all("ok" in row for row in rows), result.stdout


@pytest.mark.engine
def test_megatron_with_a_corrupted_weight_fails(tmp_path):
    pytest.importorskip("megatron.core")
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    result = run(
        MEGATRON,
        *("--corrupt", name, "--train-steps", "4", "--output-dir", str(tmp_path)),
        *("--json", str(tmp_path / "report.json")),
    )
    assert result.returncode == 1, result.stdout
    assert "FAILED" in result.stdout and "Worst tokens" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not report["passed"]


def parallel_losses(directory: Path, ranks: int, steps: int) -> dict[int, float]:
    """Of the steps that the example prints, run by torchrun."""
    result = run_python(
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
        *(str(EXAMPLES / PARALLEL), "--steps", str(steps)),
        *("--output-dir", str(directory)),
    )
    assert result.returncode == 0, result.stdout
    lines = re.findall(r"^step +(\d+) +loss ([\d.]+)", result.stdout, re.M)
    return {int(step): float(loss) for step, loss in lines}


@pytest.mark.engine
def test_tensor_parallel_training(tmp_path):
    """Two ranks begin; one goes on from their checkpoint, and serves its weights."""
    begun = parallel_losses(tmp_path, ranks=2, steps=6)
    resumed = parallel_losses(tmp_path, ranks=1, steps=6)
    assert begun.keys() == {0, 5} and resumed.keys() == {10, 11}
    assert resumed[11] < begun[5] < begun[0]
    result = run_python(
        *(str(EXAMPLES / PARALLEL), "--output-dir", str(tmp_path), "--serve"),
        *("--tensor-parallel-size", "1", "--max-tokens", "4"),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    assert result.returncode == 0, result.stdout
    assert "[The import statement]" in result.stdout


@pytest.mark.gpu(2)
def test_tensor_parallel_training_on_gpus(tmp_path):
    import torch

    alone = parallel_losses(tmp_path / "1", ranks=1, steps=31)
    for ranks in (2, 4):
        if ranks <= torch.cuda.device_count():
            together = parallel_losses(tmp_path / str(ranks), ranks, steps=31)
            assert together == pytest.approx(alone, rel=1e-3)
