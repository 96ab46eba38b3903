# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The whole chain on a stock model: train, serve, sync, reinforce, adapt.

    python examples/chain.py

Transformers' own Llama is registered by one line. It is taught to reverse digits,
served by `vllm serve`, trained on by rewards while it serves, and then given an adapter
for a second task by Tinker's client. At each joint the log-probabilities of both sides
are compared. Takes a few minutes on two CPU cores.
"""
# ruff: noqa: E402

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import tinker
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tinker import types
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from vllm.distributed.weight_sync import WeightSync
from vllm.utils.network_utils import get_open_port

DIGITS, END, EQUALS = 5, 10, 11
WORDS = [*"0123456789", ".", "="]
LIMIT = 1e-4  # of |Δ log p|, in float32
CONFIG = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=END,
    eos_token_id=END,
    dtype="float32",
)


def build(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """The factory: nothing of the model is written for vLLM."""
    return AutoModelForCausalLM.from_config(vllm_config.model_config.hf_config)


# ---- The tasks


def problems(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(10, (count, DIGITS), generator=generator)
    return [[*row, EQUALS] for row in digits.tolist()]


def reversed_digits(prompt: list[int]) -> list[int]:
    return [*reversed(prompt[:-1]), END]


def sorted_digits(prompt: list[int]) -> list[int]:
    return [*sorted(prompt[:-1]), END]


def reward(prompt: list[int], answer: list[int]) -> float:
    """The share of tokens that are right."""
    right = reversed_digits(prompt)
    return sum(a == b for a, b in zip(answer, right, strict=False)) / len(right)


# ---- The trainer


def logprobs_of(model: nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of the answer's tokens, `[len(answer)]`."""
    tokens = torch.tensor([[*prompt, *answer]])
    rows = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def pretrain(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        prompts = problems(64, seed=step)
        tokens = torch.tensor([p + reversed_digits(p) for p in prompts])
        logits = model(tokens).logits[:, DIGITS:-1]
        F.cross_entropy(
            logits.flatten(0, 1), tokens[:, DIGITS + 1 :].flatten()
        ).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def grpo_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, groups: list[list[dict]]
) -> tuple[float, float]:
    """One step on sampled answers; the mean reward, and the largest |Δ log p|."""
    difference, loss, rewards = 0.0, torch.tensor(0.0), []
    for group in groups:
        mean = sum(row["reward"] for row in group) / len(group)
        for row in group:
            ours = logprobs_of(model, row["prompt"], row["answer"])
            difference = max(difference, distance(ours, row["logprobs"]))
            loss = loss - (row["reward"] - mean) * ours.sum()
            rewards.append(row["reward"])
    (loss / len(rewards)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return sum(rewards) / len(rewards), difference


def farthest(model: nn.Module, rows: list[dict]) -> float:
    """The largest |Δ log p| between `model` and what an engine has sampled."""
    return max(
        distance(logprobs_of(model, row["prompt"], row["answer"]), row["logprobs"])
        for row in rows
    )


def distance(ours: torch.Tensor, theirs: list[float]) -> float:
    return float((ours.detach() - torch.tensor(theirs)).abs().max())


# ---- The servers


@contextmanager
def started(command: list[str], log: Path, ready: str) -> Iterator[re.Match[str]]:
    """A process, once its log has `ready`; it ends with the block."""
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=os.environ | environment,
            stdout=file,
            stderr=file,
        )
    try:
        while (found := re.search(ready, log.read_text())) is None:
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait()


def sample(url: str, prompt: list[int], n: int, temperature: float) -> list[dict]:
    """Answers with the engine's log-probabilities."""
    asked = {
        "model": "stock",
        "prompt": prompt,
        "n": n,
        "temperature": temperature,
        "max_tokens": DIGITS + 1,
        "logprobs": 1,
        "return_token_ids": True,
    }
    response = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
    response.raise_for_status()
    return [
        {
            "prompt": prompt,
            "answer": choice["token_ids"],
            "logprobs": choice["logprobs"]["token_logprobs"],
            "reward": reward(prompt, choice["token_ids"]),
        }
        for choice in response.json()["choices"]
    ]


# ---- The report


class Joints:
    """What was compared where two parts meet."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, str]] = []
        self._since = time.perf_counter()

    def add(self, name: str, difference: float, says: str) -> None:
        now = time.perf_counter()
        self.rows.append((name, difference, now - self._since, says))
        self._since = now

    def show(self) -> None:
        table = Table(title="The chain")
        for name in ("joint", "max |Δ log p|", "seconds", ""):
            table.add_column(name)
        for name, difference, seconds, says in self.rows:
            style = "" if difference <= LIMIT else "bold red"
            table.add_row(
                name, f"{difference:.1e}", f"{seconds:.0f}", says, style=style
            )
        Console().print(table)

    @property
    def hold(self) -> bool:
        return all(difference <= LIMIT for _, difference, _, _ in self.rows)


# ---- The chain


def write_model(model: nn.Module, directory: Path) -> None:
    model.save_pretrained(directory)
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".").save_pretrained(
        directory
    )


def serve_and_reinforce(
    model: nn.Module, directory: Path, args: argparse.Namespace, joints: Joints
) -> None:
    url = f"http://127.0.0.1:{get_open_port()}"
    command = ["vllm.entrypoints.cli.main", "serve", str(directory)]
    command += ["--host=127.0.0.1", f"--port={url.rpartition(':')[2]}"]
    command += ["--model-class-overrides", '{"LlamaForCausalLM": "chain:build"}']
    command += ["--served-model-name=stock", "--max-model-len=64", "--enforce-eager"]
    command += ["--dtype=float32"]
    command += [f"--tensor-parallel-size={args.tensor_parallel_size}"]
    with started(command, directory / "serve.log", "Application startup complete"):
        held_out = problems(16, seed=10**6)
        rows = [sample(url, prompt, 1, temperature=1.0)[0] for prompt in held_out]
        joints.add(
            "trainer → vllm serve", farthest(model, rows), "the files are loaded"
        )

        sync = WeightSync(model, [url])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
        worst, rewards = 0.0, []
        for step in range(args.steps):
            prompts = problems(args.prompts, seed=2 * 10**6 + step)
            groups = [sample(url, prompt, args.n, 1.0) for prompt in prompts]
            mean, difference = grpo_step(model, optimizer, groups)
            worst, rewards = max(worst, difference), [*rewards, mean]
            version = sync.update()
        says = f"reward {rewards[0]:.2f} to {rewards[-1]:.2f}, version {version}"
        joints.add(f"{args.steps} GRPO steps", worst, says)

        rows = [sample(url, prompt, 1, temperature=0.0)[0] for prompt in held_out]
        sync.close()
    right = sum(row["reward"] == 1 for row in rows)
    says = f"{right} of {len(rows)} are reversed"
    joints.add("after the last update", farthest(model, rows), says)


def adapt(directory: Path, args: argparse.Namespace, joints: Joints) -> None:
    command = ["vllm_generic.tink", "serve", str(directory), "--sampler=vllm"]
    command += [f"--root={directory / 'tink'}", "--port=0", "--model-name=stock"]
    ready = r"serves .* on (http://\S+),"
    with started(command, directory / "tink.log", ready) as found:
        client = tinker.ServiceClient(base_url=found[1], api_key="tml-local")
        adapter = client.create_lora_training_client(
            base_model="stock", rank=8
        ).result()
        for step in range(args.adapter_steps):
            data = [datum(p, sorted_digits(p)) for p in problems(16, seed=step)]
            passed = adapter.forward_backward(data, "cross_entropy")
            adapter.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            loss = passed.result().metrics["loss:sum"] / (len(data) * (DIGITS + 1))
        sorter = adapter.save_weights_and_get_sampling_client().result()
        base = client.create_sampling_client(base_model="stock").result()
        prompts = problems(16, seed=10**6)
        tokens = [p + sorted_digits(p) for p in prompts]
        trained = adapter.forward(
            [datum(p, sorted_digits(p)) for p in prompts], "cross_entropy"
        )
        worst = 0.0
        for sequence, output in zip(
            tokens, trained.result().loss_fn_outputs, strict=True
        ):
            ids = types.ModelInput.from_ints(sequence)
            sampled = sorter.compute_logprobs(ids).result()[1:]
            ours = torch.tensor(output["logprobs"].data)
            worst = max(worst, distance(ours, sampled))
        right = {
            name: sum(greedy(sampler, p) == task(p) for p in prompts)
            for name, sampler, task in (
                ("sorted by the adapter", sorter, sorted_digits),
                ("reversed by the base", base, reversed_digits),
            )
        }
        says = ", ".join(f"{n} {name}" for name, n in right.items())
        joints.add("adapter: trainer → sampler", worst, f"loss {loss:.2f}; {says}")
        client.close("success").result()


def datum(prompt: list[int], answer: list[int]) -> types.Datum:
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def greedy(sampler: Any, prompt: list[int]) -> list[int]:
    params = types.SamplingParams(max_tokens=DIGITS + 1, temperature=0.0)
    ids = types.ModelInput.from_ints(prompt)
    return (
        sampler.sample(ids, num_samples=1, sampling_params=params)
        .result()
        .sequences[0]
        .tokens
    )


def main(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    joints = Joints()
    model = AutoModelForCausalLM.from_config(CONFIG)
    pretrain(model, args.pretrain_steps)
    with tempfile.TemporaryDirectory(prefix="vllm-chain-") as name:
        directory = Path(name)
        write_model(model, directory)
        serve_and_reinforce(model, directory, args, joints)
        write_model(model, directory)
        adapt(directory, args, joints)
    joints.show()
    if args.json is not None:
        names = ("joint", "max_logprob_diff", "seconds", "says")
        rows = [dict(zip(names, row, strict=True)) for row in joints.rows]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if joints.hold else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain-steps", type=int, default=90)
    parser.add_argument("--steps", type=int, default=10, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=16, help="in a step")
    parser.add_argument("--n", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--adapter-steps", type=int, default=60)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    sys.exit(main(parser.parse_args()))
