# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""verl's own server and sender of weights, around a registered model.

python update_by_verl.py DIRECTORY ARCHITECTURE RANKS    # prints largest differences

`vLLMHttpServer` is verl's actor with vLLM's engine. `ServerAdapter.update_weights` is
what verl's trainer calls on each rank, with the weights of its module.
"""

import asyncio
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import ray
import served_llama
import torch
from transformers import AutoConfig
from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter
from verl_models import build, logits_of

PROMPT = [2, 5, 3, 4]


def adapters_of(config: Any, model_config: Any, ranks: int) -> list[ServerAdapter]:
    """Of each rank of a trainer on this machine; verl asks the environment for it."""
    found = []
    for rank in range(ranks):
        os.environ |= {"RANK": str(rank), "RAY_LOCAL_WORLD_SIZE": str(ranks)}
        found.append(ServerAdapter(config, model_config, device_mesh=None))
    return found


def update(adapters: list[ServerAdapter], module: torch.nn.Module, step: int) -> None:
    """Each rank sends all weights to the engine's worker that is beside it."""

    def send(adapter: ServerAdapter) -> None:
        weights = iter(module.state_dict().items())
        asyncio.run(adapter.update_weights(weights, global_steps=step))

    threads = [threading.Thread(target=send, args=(each,)) for each in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def save(directory: Path, architecture: str) -> None:
    """A config of more weights than a bucket, which is a mebibyte here."""
    served_llama.save(
        directory, hidden_size=256, intermediate_size=512, num_key_value_heads=2
    )
    if architecture == "PlainGPT":
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config |= {"architectures": [architecture], "model_type": "plain_gpt"}
        path.write_text(json.dumps(config))


def main(directory: Path, architecture: str, ranks: int) -> list[float]:
    save(directory, architecture)
    config = RolloutConfig(
        name="vllm",
        dtype="float32",
        max_model_len=64,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        prompt_length=16,
        response_length=16,
        tensor_model_parallel_size=ranks,
        enforce_eager=True,
        enable_sleep_mode=False,  # vLLM has none on a CPU
        free_cache_engine=False,
        engine_kwargs={"vllm": {"kv_cache_memory_bytes": 1 << 24}},
        checkpoint_engine=CheckpointEngineConfig(update_weights_bucket_megabytes=1),
    )
    model_config = HFModelConfig(
        path=str(directory), override_config={"attn_implementation": "sdpa"}
    )
    hf_config = AutoConfig.from_pretrained(directory)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
    server = (
        ray.remote(vLLMHttpServer)
        .options(name="vllm_server_0_0", max_concurrency=16, num_cpus=1)
        .remote(config, model_config, RolloutMode.HYBRID, [], 0, 0, ranks, 1, "")
    )
    ray.get(server.launch_server.remote())
    adapters = adapters_of(config, model_config, ranks)
    worst = []
    for step in range(2):
        torch.manual_seed(step)
        module = build(architecture, hf_config).eval()
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.normal_(std=0.3)
        update(adapters, module, step)
        params = {"temperature": 1.0, "logprobs": True, "max_tokens": 8}
        output = ray.get(server.generate.remote(PROMPT, params, f"request-{step}"))
        tokens = PROMPT + list(output.token_ids)
        logprobs = logits_of(module, tokens).log_softmax(-1)[len(PROMPT) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        difference = (torch.tensor(output.log_probs) - expected).abs().max()
        assert output.extra_fields["global_steps"] == step
        worst.append(float(difference))
    return worst


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
    ray.shutdown()
