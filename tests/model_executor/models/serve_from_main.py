# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serve a closure of `__main__` on two ranks: `serve_from_main.py DIR fork|spawn`.

Prints the continuation of a prompt as JSON. A program of its own, because a process
that has run OpenMP threads must not fork workers.
"""

import json
import os
import sys
import threading

import torch
from tiny_model import TinyModel

from vllm import EngineArgs, ModelRegistry, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine


class ScaledModel(TinyModel):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states) * self.scale


def main(model_dir: str, start_method: str) -> None:
    scale = 2.0
    # Cannot be pickled, and under fork need not be.
    guard = threading.Lock() if start_method == "fork" else None

    def factory(vllm_config, parallel_context):
        assert guard is None or guard.acquire(blocking=False)
        group = parallel_context.get_tp_process_group()
        assert parallel_context.get_tensor_parallel_world_size() == 2
        assert torch.distributed.get_world_size(group) == 2
        rank = torch.distributed.get_rank(group)
        assert rank == parallel_context.get_tensor_parallel_rank()
        return ScaledModel(scale)

    ModelRegistry.register_model("TinyModel", factory)
    config = EngineArgs(
        model=model_dir,
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=2,
        kv_cache_memory_bytes=1 << 24,
    ).create_engine_config()
    # vLLM's CPU platform asks for spawn while it makes the config.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method
    engine = LLMEngine.from_vllm_config(config)
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": list(range(40))}, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    engine.engine_core.shutdown()
    print(json.dumps(list(outputs[-1].outputs[0].token_ids)))


if __name__ == "__main__":
    main(*sys.argv[1:])
