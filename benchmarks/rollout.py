# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a rollout costs beside generation and training.

    python benchmarks/rollout.py --size 1b
    python benchmarks/rollout.py --size 1b --two-gpus     also: asynchronous
    python benchmarks/rollout.py --size 1m --device cpu

- `colocated`: the phases of a step of `VLLMModule`: generate, decode, offload, train,
  sync, onload; the share outside of generate and train; and the rate of generation in
  it, of that of the same engine's own `generate`.
- `synchronous`, `asynchronous`: samples a second with long-tailed lengths of answers,
  the trainer on a GPU of its own, `max_versions_behind` 0 and 2.

Each runs in processes of its own, after the other. Times are medians of steps after the
first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import host, last_json
from llama import Llama, LlamaShape
from weight_sync import SHAPES, factory, trainer_of

from vllm import LLM
from vllm.v1.attention.training.sequences import packed_sequences
from vllm_generic.rollout import VLLMModule, answered_ahead
from vllm_generic.rollout.engines import Request

KINDS = ("colocated", "synchronous", "asynchronous")


class LongTailed(VLLMModule):
    """Answers whose lengths are drawn: most are short, and a few are long."""

    def _add_request(
        self, data: dict[str, Any], is_eval: bool = False
    ) -> list[Request]:
        requests = super()._add_request(data, is_eval)
        drawn = random.Random(sum(data["input_ids"][0]))
        for request in requests:
            length = drawn.lognormvariate(0, 1) * self.config.max_new_tokens / 8
            request.params.max_tokens = min(
                max(int(length), 1), self.config.max_new_tokens
            )
        return requests


def policy(args: argparse.Namespace, folder: Path, cls: type[VLLMModule]) -> VLLMModule:
    keys: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "dtype": args.dtype,
        "n": args.n,
        "ignore_eos": True,
        "seed": None,
        "seq_length": args.prompt_tokens + args.new_tokens,
        "max_new_tokens": args.new_tokens,
        "asynchronous": args.child != "colocated",
        "enforce_eager": args.device == "cpu",
        "gpu_memory_utilization": 0.5,
    }
    if args.device == "cpu":
        keys["kv_cache_memory_bytes"] = 1 << 28
    module = cls(keys, model_provider=factory(SHAPES[args.size]))
    module.setup()
    return module


def train(
    model: Llama, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> None:
    """A step of policy gradients with random advantages."""
    device = next(model.parameters()).device
    for rows in batch["all_tokens"].split(8):
        samples, length = rows.shape
        tokens = rows.to(device).flatten()  # [samples * length]
        positions = torch.arange(length, device=device).repeat(samples)
        with packed_sequences([length * number for number in range(samples + 1)]):
            logits = model.lm_head(model(tokens, positions)).float()
            log_p = -torch.nn.functional.cross_entropy(
                logits[:-1], tokens[1:], reduction="none"
            )
            (log_p * torch.randn_like(log_p)).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches(shape: LlamaShape, args: argparse.Namespace) -> list[dict[str, Any]]:
    drawn = random.Random(0)
    return [
        {
            "input_ids": [
                [
                    drawn.randrange(2, shape.vocab_size)
                    for _ in range(args.prompt_tokens)
                ]
                for _ in range(args.prompts)
            ]
        }
        for _ in range(args.steps + 1)
    ]


def timed(phases: dict[str, float], name: str, action: Any, *arguments: Any) -> Any:
    begin = time.perf_counter()
    result = action(*arguments)
    phases[name] = time.perf_counter() - begin
    return result


def run_colocated(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    module = policy(args, folder, VLLMModule)
    model = trainer_of(args, args.dtype).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    steps: list[dict[str, float]] = []
    own: list[float] = []
    for number, data in enumerate(batches(SHAPES[args.size], args)):
        phases: dict[str, float] = {}
        timed(phases, "sync", module.parameter_sync, model)
        timed(phases, "onload", module.onload)
        # Whoever comes first after an update pays for it, so they take turns.
        if number % 2:
            own.append(own_generate(module, data))
        outputs = timed(phases, "generate", module.generate, data, number)
        batch = timed(phases, "decode", module.decode_internal, outputs)
        timed(phases, "offload", module.offload)
        timed(phases, "train", train, model, optimizer, batch)
        if not number % 2:
            module.onload()
            own.append(own_generate(module, data))
        steps.append(phases)
    median = {
        name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]
    }
    total = sum(median.values())
    outside = total - median["generate"] - median["train"]
    module.close()
    return {
        "seconds": median,
        "share outside generation and training": outside / total,
        "generation, of the engine's own": statistics.median(own[1:])
        / median["generate"],
        "samples per second": args.prompts * args.n / total,
    }


def own_generate(module: VLLMModule, data: dict[str, Any]) -> float:
    """Seconds of the same engine's `generate`, of the same prompts and parameters."""
    llm: LLM = module.engine.llm  # type: ignore[attr-defined]
    length = module.seq_length
    prompts = [{"prompt_token_ids": ids} for ids in data["input_ids"]]
    params = [module.config.sampling_params(len(i), length) for i in data["input_ids"]]
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    seconds = time.perf_counter() - begin
    llm.reset_prefix_cache()
    return seconds


def run_ahead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    module = policy(args, folder, LongTailed)
    model = trainer_of(args, args.dtype).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    behind = 2 if args.child == "asynchronous" else 0
    module.parameter_sync(model)
    begin = 0.0
    for _, batch in answered_ahead(module, batches(SHAPES[args.size], args), behind):
        train(model, optimizer, batch)
        module.parameter_sync(model)
        begin = begin or time.perf_counter()  # the first step is not counted
    seconds = (time.perf_counter() - begin) / args.steps
    module.close()
    return {"samples per second": args.prompts * args.n / seconds}


def run_child(args: argparse.Namespace) -> None:
    """One measurement; its result is the last line."""
    run = run_colocated if args.child == "colocated" else run_ahead
    with tempfile.TemporaryDirectory() as folder:
        config = SHAPES[args.size].config("RolloutLlama") | {"model_type": "rollout"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        print(json.dumps(run(args, Path(folder))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--two-gpus", action="store_true")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--results", type=Path, help="write the table there, as JSON")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return
    apart = args.two_gpus or args.device == "cpu"
    kinds = args.kinds or (KINDS if apart else KINDS[:1])
    table: dict[str, Any] = {"arguments": sys.argv[1:], "host": host(), "rows": {}}
    for kind in kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        table["rows"][kind] = last_json(done.stdout)
        print(kind, json.dumps(table["rows"][kind], indent=1), flush=True)
    if args.results:
        args.results.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
