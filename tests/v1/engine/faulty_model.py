# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serve a model that goes wrong: `faulty_model.py MODEL_DIR SIGNS_DIR FAULT OPTIONS`.

`FAULT` is one of `FACTORIES`, `OPTIONS` are engine arguments as JSON. Prints the
continuation of a prompt, then waits. A file in `SIGNS_DIR` tells how far it came. With
`IN_EVENT_LOOP` in the environment, it does so in a coroutine.
"""

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNS = Path(sys.argv[2])
(SIGNS / "importing").touch()

import torch  # noqa: E402
from tiny_model import TinyModel  # noqa: E402

from vllm import EngineArgs, ModelRegistry, SamplingParams  # noqa: E402
from vllm.model_executor.parallel_context import ParallelContext  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

Action = Callable[[], Any]


def wait_here(sign: str) -> None:
    (SIGNS / sign).touch()
    time.sleep(600)


def kill_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    torch.empty(1 << 50)


def limit_memory() -> None:
    """Room for the engine's message queues, and not for a KV cache of 1 GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (768 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def wait_for_all_ranks(context: ParallelContext) -> None:
    group = context.get_tp_process_group()
    torch.distributed.all_reduce(torch.ones(1), group=group)


class InStep(TinyModel):
    """Does `action` in its step number `step`, and all ranks meet in every step."""

    def __init__(self, context: ParallelContext, action: Action, step: int) -> None:
        super().__init__()
        self.context, self.action, self.steps_to_go = context, action, step

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.steps_to_go -= 1
        if self.steps_to_go == 0:
            self.action()
        wait_for_all_ranks(self.context)
        return super().forward(input_ids, positions)


class InLoading(TinyModel):
    """Does `action` in the place of loading its weights."""

    def __init__(self, action: Action) -> None:
        super().__init__()
        self.action = action

    def load_weights(self, weights: object) -> None:
        self.action()


def while_building(action: Action) -> Callable[..., TinyModel]:
    """Rank 1 does `action` in the factory; rank 0 waits for it in a collective."""

    def build(vllm_config: object, context: ParallelContext) -> TinyModel:
        if context.tensor_parallel_rank == 1:
            action()
        wait_for_all_ranks(context)
        return TinyModel()

    return build


def in_step(step: int, action: Action) -> Callable[..., TinyModel]:
    """Rank 1 does `action` in a step of the model; rank 0 waits in a collective."""

    def build(vllm_config: object, context: ParallelContext) -> TinyModel:
        mine = action if context.tensor_parallel_rank == 1 else lambda: None
        return InStep(context, mine, step)

    return build


# The first step tries the model while it is loaded.
FACTORIES = {
    "none": lambda vllm_config, context: TinyModel(),
    "kill while building": while_building(kill_this_rank),
    "hang while building": while_building(lambda: wait_here("building")),
    "no memory while building": while_building(run_out_of_memory),
    "hang alone": lambda vllm_config, context: wait_here("building"),
    "hang while loading": lambda config, context: InLoading(
        lambda: wait_here("loading")
    ),
    "no memory for the cache": while_building(limit_memory),
    "hang while warming up": in_step(2, lambda: wait_here("warming up")),
    "hang while trying": in_step(1, lambda: wait_here("trying")),
    "kill while generating": in_step(6, kill_this_rank),
    "no memory while generating": in_step(6, run_out_of_memory),
    "hang while generating": in_step(6, lambda: wait_here("generating")),
}


def main(model_dir: str, signs: str, fault: str, options: str) -> None:
    ModelRegistry.register_model("TinyModel", FACTORIES[fault])
    settings = {
        "model": model_dir,
        "dtype": "float32",
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 24,
    }
    engine = LLMEngine.from_engine_args(EngineArgs(**(settings | json.loads(options))))
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": list(range(40))}, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    print(json.dumps(list(outputs[-1].outputs[0].token_ids)), flush=True)
    wait_here("idle")


async def main_in_an_event_loop() -> None:
    main(*sys.argv[1:])


if __name__ == "__main__":
    if "IN_EVENT_LOOP" in os.environ:
        asyncio.run(main_in_an_event_loop())
    else:
        main(*sys.argv[1:])
