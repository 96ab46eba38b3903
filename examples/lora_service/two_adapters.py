# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train two adapters at once on different texts, then sample both side by side.

Starts a service with a small random model on this machine and talks to it with the
``tinker`` client. Takes under two minutes on a CPU.

    python examples/lora_service/two_adapters.py [--steps 60] [--url http://…]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import tinker
from tinker import types

MODEL = "tiny/model"
TEXTS = {
    "proverbs": "The early bird catches the worm. The pen is mightier than the sword. "
    "The grass is always greener on the other side. A watched pot never boils.",
    "weather": "The morning will be cloudy with light rain in the north. The afternoon "
    "brings sunshine to the coast. The night stays dry and cold in the valleys.",
}
PROMPTS = ["The early", "The morning", "The "]
BARS = "▁▂▃▄▅▆▇█"


@contextmanager
def service(url: str | None) -> Iterator[str]:
    """The address of a service, which is started if none is given."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as root:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_generic.tink", "serve"]
            + ["--root", root, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"serves .* on (http://\S+),", line):
                    # read on, or the service would wait for a full pipe
                    ThreadPoolExecutor(1).submit(process.stderr.read)
                    yield found[1]
                    return
            raise RuntimeError("the service did not start")
        finally:
            process.terminate()
            process.wait()


def train(client: Any, text: str, steps: int) -> list[float]:
    """Losses per token."""
    tokens = client.get_tokenizer().encode(text)
    data = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [1.0] * (len(tokens) - 1),
        },
    )
    losses = []
    for _ in range(steps):
        passed = client.forward_backward([data], "cross_entropy")
        step = client.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(passed.result().metrics["loss:sum"] / (len(tokens) - 1))
        step.result()
    return losses


def complete(sampler: Any, tokenizer: Any, prompt: str) -> str:
    ids = types.ModelInput.from_ints(tokenizer.encode(prompt))
    params = types.SamplingParams(max_tokens=24, temperature=0.0)
    result = sampler.sample(ids, num_samples=1, sampling_params=params).result()
    return tokenizer.decode(result.sequences[0].tokens)


def curve(values: list[float], width: int = 40) -> str:
    """Values as a line of bars."""
    chosen = values[:: max(1, len(values) // width)]
    top = max(chosen)
    return "".join(BARS[min(7, int(8 * value / top))] for value in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a running service; one is started if missing")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with service(options.url) as url:
        key = os.environ.get("TINKER_API_KEY", "tml-local")
        client = tinker.ServiceClient(base_url=url, api_key=key)
        clients = {
            name: client.create_lora_training_client(
                base_model=MODEL, rank=rank
            ).result()
            for name, rank in zip(TEXTS, (8, 32), strict=True)
        }
        started = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            jobs = {
                name: pool.submit(train, clients[name], text, options.steps)
                for name, text in TEXTS.items()
            }
            losses = {name: job.result() for name, job in jobs.items()}
        seconds = time.perf_counter() - started
        print(f"{options.steps} steps of two adapters at once in {seconds:.1f} s\n")
        print(f"{'adapter':10} {'first':>7} {'last':>7}  loss per token")
        for name, values in losses.items():
            print(f"{name:10} {values[0]:7.3f} {values[-1]:7.3f}  {curve(values)}")
        tokenizer = clients["proverbs"].get_tokenizer()
        samplers = {
            name: each.save_weights_and_get_sampling_client().result()
            for name, each in clients.items()
        }
        print(f"\n{'prompt':12} {'proverbs':42} weather")
        for prompt in PROMPTS:
            texts = [
                complete(each, tokenizer, prompt)[:40] for each in samplers.values()
            ]
            print(f"{prompt!r:12} {texts[0]!r:42} {texts[1]!r}")
        client.close("success").result()


if __name__ == "__main__":
    main()
