# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Two servers by their URLs; one is killed in the middle of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import save_file
from servers import tiny_servers
from soft_model import soft_model, worst_difference

from vllm_generic.rollout import VLLMModule

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_one_of_two_servers_is_killed(
    model_dir_with_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = model_dir_with_tokenizer
    model = soft_model(0)
    save_file(model.state_dict(), folder / "model.safetensors")
    options = ["--max-model-len", "64", "--enable-scale-out"]
    options += ["--logprobs-mode", "processed_logprobs"]
    logs = tmp_path_factory.mktemp("logs")
    with tiny_servers(folder, logs, 2, *options, VLLM_SERVER_DEV_MODE="1") as started:
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
