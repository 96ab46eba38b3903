# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Start and stop an engine many times: `rounds.py MODEL_DIR ROUNDS RANKS`.

Prints what the process holds after each round, as lines of JSON. With one rank the
engine is in this process, with more it and its workers are processes of their own.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

RANKS = int(sys.argv[3])
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(RANKS > 1))

from tiny_model import build, greedy, trained_model  # noqa: E402

from vllm import LLM, ModelRegistry, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

PROMPT = list(range(40))


def one_round(model_dir: str) -> list[int]:
    llm = LLM(
        model=model_dir,
        dtype="float32",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
        tensor_parallel_size=RANKS,
        kv_cache_memory_bytes=1 << 24,
    )
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    outputs = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return list(outputs[0].outputs[0].token_ids)


def held() -> dict[str, int]:
    process = psutil.Process()
    return {
        "processes": sum(
            child.status() != psutil.STATUS_ZOMBIE
            for child in process.children(recursive=True)
        ),
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "mapped segments": sum(
            "/dev/shm/" in mapping.path for mapping in process.memory_maps()
        ),
        "temporary files": len(list(Path(tempfile.gettempdir()).rglob("*"))),
        "resident MiB": process.memory_info().rss >> 20,
    }


def settled() -> dict[str, int]:
    """What is held once threads that close sockets have had their time."""
    last = held()
    for _ in range(30):
        time.sleep(0.5)
        gc.collect()
        before, last = last, held()
        if before == last:
            break
    return last


def main(model_dir: str, rounds: int) -> None:
    ModelRegistry.register_model("TinyModel", build)
    expected = greedy(trained_model(), PROMPT, 8)
    for _ in range(rounds):
        assert one_round(model_dir) == expected
        cleanup_dist_env_and_memory()
        print(json.dumps(settled()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
