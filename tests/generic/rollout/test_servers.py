# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Two servers by their URLs; one is killed in the middle of a batch."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from safetensors.torch import save_file

from vllm.utils.network_utils import get_open_port
from vllm_generic.rollout import VLLMModule

sys.path.insert(0, str(Path(__file__).parent))
from soft_model import soft_model, worst_difference  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@contextlib.contextmanager
def servers(
    model_dir: Path, logs: Path, count: int
) -> Iterator[dict[str, psutil.Popen]]:
    """`vllm serve` processes by their URLs."""
    started = {}
    for number in range(count):
        port = get_open_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
        command += [str(model_dir), "--port", str(port), "--host", "127.0.0.1"]
        command += ["--model-class-overrides", '{"TinyModel": "tiny_model:build"}']
        command += ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
        command += ["--kv-cache-memory-bytes", "16777216"]
        command += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
        with (logs / f"{number}.txt").open("w") as log:
            started[f"http://127.0.0.1:{port}"] = psutil.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
            )
    try:
        for number, (url, process) in enumerate(started.items()):
            while True:
                assert process.poll() is None, (logs / f"{number}.txt").read_text()
                with contextlib.suppress(requests.ConnectionError):
                    if requests.get(f"{url}/health", timeout=5).ok:
                        break
                time.sleep(0.2)
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def test_one_of_two_servers_is_killed(
    model_dir_with_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = model_dir_with_tokenizer
    model = soft_model(0)
    save_file(model.state_dict(), folder / "model.safetensors")
    with servers(folder, tmp_path_factory.mktemp("logs"), 2) as started:
        keys: dict[str, Any] = {"engine_urls": list(started), "tokenizer": str(folder)}
        keys |= {"temperature": 0.7, "n": 2, "max_new_tokens": 20, "timeout": 60}
        keys |= {"prompt_logprobs": 1}
        module = VLLMModule(keys)
        module.setup()
        assert module.seq_length == 64
        dataset = module.build_dataset([f"t{i} t{i + 1}" for i in range(32)])
        data = dataset.collate(dataset.items)
        batch = module.forward_step(data)
        assert worst_difference(model, batch, 0.7) <= 1e-4
        assert all(text.strip().startswith("t") for text in batch["str_outputs"])

        model = soft_model(1)
        assert module.parameter_sync(model) == 1
        batch = module.forward_step(data)
        assert worst_difference(model, batch, 0.7) <= 1e-4
        assert (batch["weight_versions"][batch["loss_mask"] > 0] == 1).all()

        under_way = module.begin_step(data)
        url, process = next(iter(started.items()))
        for each in [process, *process.children(recursive=True)]:
            each.kill()
        again = under_way.result(120)
        assert again["prompt_index"].tolist() == batch["prompt_index"].tolist()
        assert again["all_tokens"].tolist() == batch["all_tokens"].tolist()

        # The next update reaches the one that is left, and numbers go on.
        model = soft_model(2)
        assert module.parameter_sync(model) == 2
        batch = module.forward_step(data)
        assert worst_difference(model, batch, 0.7) <= 1e-4
        assert (batch["weight_versions"][batch["loss_mask"] > 0] == 2).all()
        with pytest.raises(ValueError, match="Prompt 0 of the batch has 64 tokens"):
            module.forward_step({"input_ids": [[1] * 64]})
        module.close()
        assert url not in requests.get(f"{list(started)[1]}/health", timeout=9).text
