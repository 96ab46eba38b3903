# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serve a closure of `__main__` on two ranks: `serve_from_main.py DIR WAY`.

Prints the continuation of a prompt as JSON. A program of its own, because a process
that has run OpenMP threads must not fork workers, and launchers start programs.
"""

import json
import multiprocessing
import os
import sys
import threading

import torch
from tiny_model import TinyModel

from vllm import EngineArgs, ModelRegistry, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

# Ways that pickle the model config, and so the factory.
PICKLED = ("spawn", "forkserver", "ray", "data_parallel")


class ScaledModel(TinyModel):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states) * self.scale


def count_workers_as_gpus() -> None:
    """vLLM's Ray executor asks the platform what to count; a CPU has no answer."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def start_ray() -> None:
    import ray

    count_workers_as_gpus()
    ray.init(
        num_cpus=2,
        num_gpus=4,  # vLLM's executor keeps the two of a start that failed
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": count_workers_as_gpus},
        _node_ip_address="127.0.0.1",
    )


def start_engine(model_dir: str, way: str) -> LLMEngine:
    if way in ("fork", "spawn", "forkserver"):
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = way
    arguments = EngineArgs(
        model=model_dir,
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=1 if way == "data_parallel" else 2,
        distributed_executor_backend=(
            way if way in ("ray", "external_launcher") else None
        ),
        kv_cache_memory_bytes=1 << 24,
    )
    return LLMEngine.from_engine_args(arguments)


def main(model_dir: str, way: str) -> None:
    scale = 2.0
    guard = threading.Lock()  # cannot be pickled

    def factory(vllm_config, parallel_context):
        if way == "data_parallel":
            group = parallel_context.get_dp_process_group()
            rank = parallel_context.get_data_parallel_rank()
            assert parallel_context.get_data_parallel_size() == 2
        else:
            group = parallel_context.get_tp_process_group()
            rank = parallel_context.get_tensor_parallel_rank()
            assert parallel_context.get_tensor_parallel_world_size() == 2
        assert (group.size(), group.rank()) == (2, rank)
        return ScaledModel(scale)

    def guarded(vllm_config, parallel_context):
        with guard:
            return factory(vllm_config, parallel_context)

    if way == "ray":
        start_ray()
    ModelRegistry.register_model("TinyModel", guarded)
    if way in PICKLED:
        try:
            start_engine(model_dir, way)
        except TypeError as error:
            assert "guard (a lock) cannot be pickled" in str(error), error
        else:
            raise AssertionError("a lock was pickled")
        assert not multiprocessing.active_children()
        # A rank that is ahead must not meet the store of the other's first start.
        if way == "data_parallel":
            port = int(os.environ["VLLM_DP_MASTER_PORT"])
            os.environ["VLLM_DP_MASTER_PORT"] = str(port + 8)
        ModelRegistry.register_model("TinyModel", factory)
    engine = start_engine(model_dir, way)
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": list(range(40))}, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    engine.engine_core.shutdown()
    print(json.dumps(list(outputs[-1].outputs[0].token_ids)))


if __name__ == "__main__":
    main(*sys.argv[1:])
