# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the benchmarks share: the host, a child's result, and rates."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


def host() -> dict[str, Any]:
    """The date, the GPU and the versions, for the head of a results file."""
    import torch

    import vllm

    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
    }


def median_seconds(
    work: Callable[[], Any], times: int, synchronize: bool = False
) -> float:
    """The median of `times` calls after a first one, each until the GPU has ended."""
    import torch

    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        work()
        if synchronize:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


class Child:
    """A process that writes a line "= value" when it is ready, and for each line read.

    Args:
        arguments: Of the Python interpreter.
        env: Variables beside this process's own.

    """

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._name = " ".join(arguments)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: object) -> float:
        """The value that the child answers."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> float:
        """Its next value. Raises RuntimeError if it ends instead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return float(line[2:])
        code = self._process.wait()
        raise RuntimeError(f"{self._name} ended with code {code}; its log says why")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def last_json(output: str | bytes) -> Any:
    """What a child printed as its result, whatever was printed around it."""
    lines = output.decode() if isinstance(output, bytes) else output
    return json.loads([x for x in lines.splitlines() if x.startswith("{")][-1])


def random_prompts(
    vocab_size: int, prompt_tokens: int, count: int
) -> list[dict[str, list[int]]]:
    """The same prompts on every call, as vLLM takes token ids."""
    generator = random.Random(0)
    return [
        {
            "prompt_token_ids": [
                generator.randrange(2, vocab_size) for _ in range(prompt_tokens)
            ]
        }
        for _ in range(count)
    ]


def generation_rate(
    llm: "LLM", prompts: list[dict[str, list[int]]], new_tokens: int, **options: Any
) -> float:
    """New tokens a second while `prompts` are generated together, greedily.

    `options` are those of `LLM.generate`.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    begin = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False, **options)
    return len(prompts) * new_tokens / (time.perf_counter() - begin)


def generation_rates(
    llm: "LLM",
    vocab_size: int,
    prompt_tokens: int,
    new_tokens: int,
    at_once: int,
    repeats_alone: int,
) -> dict[str, float]:
    """Median new tokens a second, of `at_once` requests together and of one alone."""
    prompts = random_prompts(vocab_size, prompt_tokens, at_once)

    def rate(count: int) -> float:
        return generation_rate(llm, prompts[:count], new_tokens)

    rate(at_once), rate(1)
    return {
        "at_once": statistics.median(rate(at_once) for _ in range(3)),
        "alone": statistics.median(rate(1) for _ in range(repeats_alone)),
    }
