# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the difference between engine and trainer changes in reinforcement learning.

    python benchmarks/rl_exactness.py --json results.json --plot curves.svg

The task of examples/rl, GRPO without a clip or a correction of the ratio, and a model
of 57 M parameters in bfloat16 with float32 masters. Each run is a process of its own,
in one of three variants:

- `exact`: one module in engine and trainer, with `VLLM_BATCH_INVARIANT=1`;
- `one module`: the same module, in the default engine;
- `two implementations`: vLLM's Llama in the engine, Transformers' in the trainer.

All variants of a seed start from the same weights, which were pretrained from that
seed, and see the same problems. Runs of one variant share the GPU. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from harness import host, last_json
from llama import Llama, LlamaShape

EXAMPLE = Path(__file__).parents[1] / "examples" / "rl"
VARIANTS = ("exact", "one module", "two implementations")
SHAPE = LlamaShape(
    hidden_size=640,
    intermediate_size=1728,
    num_hidden_layers=12,
    num_attention_heads=10,
    num_key_value_heads=10,
    head_dim=64,
    vocab_size=64,  # the task has 13 tokens
    rope_theta=10000.0,
    max_position_embeddings=64,
)
PROMPTS, ANSWERS = 32, 16
LogProbs = Callable[[list[list[int]]], torch.Tensor]


class Masters:
    """AdamW on float32 copies of a bfloat16 model's parameters."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        self.model = model
        self.masters = [p.detach().float() for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self) -> None:
        """With the model's gradients, which are clipped and taken away."""
        for master, parameter in zip(
            self.masters, self.model.parameters(), strict=True
        ):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(
                self.masters, self.model.parameters(), strict=True
            ):
                parameter.copy_(master)


def own_logprobs(model: Llama, invariant: bool) -> LogProbs:
    """Of the module that serves, on packed sequences: every token but each first."""
    from vllm.model_executor.layers.trainable_attention import packed_sequences
    from vllm.training.batch_invariance import token_log_probs

    def logprobs(sequences: list[list[int]]) -> torch.Tensor:
        lengths = [len(sequence) for sequence in sequences]
        ids = torch.tensor(sum(sequences, []), device="cuda")
        positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        keep = torch.ones(len(ids), dtype=torch.bool, device="cuda")
        keep[cu_seqlens[1:].long() - 1] = False
        with packed_sequences(cu_seqlens):
            hidden = model(ids, positions)
            logits = model.lm_head(hidden[keep])
        targets = ids[1:][keep[:-1]]
        if invariant:
            return token_log_probs(logits, targets)
        return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return logprobs


def transformers_logprobs(model: torch.nn.Module) -> LogProbs:
    """Of Transformers' Llama, on padded rows: every token but each first."""

    def logprobs(sequences: list[list[int]]) -> torch.Tensor:
        length = max(map(len, sequences))
        rows = [s + [0] * (length - len(s)) for s in sequences]
        ids = torch.tensor(rows, device="cuda")  # [sequences, length]
        counts = torch.tensor([len(s) for s in sequences], device="cuda")
        keep = torch.arange(1, length, device="cuda") < counts[:, None]
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        values = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return values[keep]

    return logprobs


def pretrained(seed: int, goal: float, lr: float) -> Llama:
    """A model that was shown answers until it knows the share `goal` of others."""
    from reverse_digits import DIGITS, answer_to, problems, prompts_of

    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = Llama(SHAPE).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    masters, logprobs = Masters(model, lr), own_logprobs(model, invariant=False)

    def sequences(digits: torch.Tensor) -> list[list[int]]:
        return [[*p, *answer_to(p)] for p in prompts_of(digits)]

    others = sequences(problems(256, seed=1, held_out=True))
    for step in range(1500):
        if step % 5 == 0:
            with torch.no_grad():
                sure = logprobs(others).view(256, -1)[:, DIGITS:].sum(1).exp().mean()
            if sure >= goal:
                print(f"pretrained in {step} steps", file=sys.stderr)
                return model
        batch = sequences(problems(256, seed=1000 * seed + step))
        loss = -logprobs(batch).view(256, -1)[:, DIGITS:].mean()
        loss.backward()
        masters.step()
    raise RuntimeError(
        f"Seed {seed} answers {float(sure):.2f} of the problems after 1,500 steps, "
        f"expected {goal}; try another --pretrain-lr."
    )


def run(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: rewards, exact matches and differences by step."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if variant == "exact":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    sys.path.insert(0, str(EXAMPLE))
    from reverse_digits import DIGITS, END, answer_to, problems, prompts_of, reward

    from vllm import LLM, ModelRegistry, SamplingParams
    from vllm.training.batch_invariance import batch_invariant

    start = time.perf_counter()
    two = variant == "two implementations"
    if variant == "exact":
        with batch_invariant():  # before the process's first product of matrices
            model: Any = pretrained(seed, args.start_share, args.pretrain_lr)
    else:
        model = pretrained(seed, args.start_share, args.pretrain_lr)
    weights = {name: w.clone() for name, w in model.checkpoint().items()}
    architecture = "LlamaForCausalLM" if two else "PlainLlama"
    if not two:
        ModelRegistry.register_model(architecture, lambda c, p: Llama(SHAPE))
    with tempfile.TemporaryDirectory() as directory:
        config = SHAPE.config(architecture)
        (Path(directory) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=32,
            max_num_seqs=PROMPTS * ANSWERS,
            gpu_memory_utilization=0.02,
            kv_cache_memory_bytes=1 << 30,
            seed=seed,
            compilation_config={"cudagraph_capture_sizes": [1, 64, 256, 512]},
        )
    if two:
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE.config(architecture)))
        model.to(torch.bfloat16).load_state_dict(weights, strict=False)
        logprobs = transformers_logprobs(model)

        def sync() -> None:
            state = model.state_dict().items()
            llm.apply_model(lambda served: served.load_weights(state))
            llm.reset_prefix_cache()
    else:
        from vllm.distributed.weight_sync import WeightSync

        logprobs = own_logprobs(model, variant == "exact")
        sync = WeightSync(model, llm).update
    masters = Masters(model, args.lr)
    sync()

    def sample(digits: torch.Tensor, n: int, temperature: float, seed: int) -> Any:
        """Prompts with answers, rewards, exact matches, and log-probabilities."""
        params = SamplingParams(
            n=n,
            temperature=temperature,
            max_tokens=DIGITS + 1,
            logprobs=0,
            detokenize=False,
            seed=seed,
            stop_token_ids=[END],
        )
        prompts = prompts_of(digits)
        requests: Any = [{"prompt_token_ids": p} for p in prompts]
        sequences, rewards, exact, sampled = [], [], [], []
        for output in llm.generate(requests, params, use_tqdm=False):
            prompt = list(output.prompt_token_ids)
            for completion in output.outputs:
                answer = list(completion.token_ids)
                sequences.append(prompt + answer)
                rewards.append(reward(prompt, answer))
                exact.append(answer == answer_to(prompt))
                sampled += [
                    entry[token].logprob
                    for token, entry in zip(answer, completion.logprobs, strict=True)
                ]
        return sequences, torch.tensor(rewards), exact, sampled

    held_out = problems(256, seed=0, held_out=True)
    rows, before = [], statistics.mean(sample(held_out, 1, 0.0, 0)[2])
    context = batch_invariant if variant == "exact" else nullcontext
    began = time.perf_counter()
    for step in range(args.steps):
        digits = problems(PROMPTS, seed=10**6 * (seed + 1) + step)
        sequences, rewards, exact, sampled = sample(digits, ANSWERS, 1.0, step)
        grouped = rewards.view(PROMPTS, ANSWERS)
        advantages = (grouped - grouped.mean(dim=1, keepdim=True)).flatten()
        counts = torch.tensor([len(s) - 1 for s in sequences])
        new = torch.cat([torch.arange(n) >= DIGITS for n in counts.tolist()])
        with context():
            values = logprobs(sequences)[new.cuda()]
            weights_of = advantages.repeat_interleave(counts - DIGITS).cuda()
            # Exactly on policy: the gradient of the ratio at one.
            loss = -(values * weights_of).mean()
            loss.backward()
        difference = (values.detach().double().cpu() - torch.tensor(sampled)).abs()
        masters.step()
        sync()
        rows.append(
            {
                "reward": float(rewards.mean()),
                "exact match": statistics.mean(exact),
                "max |Δ log p|": float(difference.max()),
                "mean |Δ log p|": float(difference.mean()),
            }
        )
    after = statistics.mean(sample(held_out, 1, 0.0, 0)[2])
    now = time.perf_counter()
    return {
        "variant": variant,
        "seed": seed,
        "before": before,
        "after": after,
        "seconds": round(now - start, 1),
        "rl_seconds": round(now - began, 1),
        "steps": rows,
    }


def report(runs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="by variant: mean over seeds, and the least and the largest")
    columns = ("variant", "seeds", "before", "after", "reward of all steps")
    for column in (*columns, "max |Δ log p|", "s a run"):
        table.add_column(column)

    def spread(values: list[float], form: str) -> str:
        low, mean, high = min(values), statistics.mean(values), max(values)
        return f"{mean:{form}} ({low:{form}} to {high:{form}})"

    for variant in VARIANTS:
        mine = [run for run in runs if run["variant"] == variant]
        if not mine:
            continue
        rewards = [statistics.mean(s["reward"] for s in r["steps"]) for r in mine]
        largest = max(s["max |Δ log p|"] for r in mine for s in r["steps"])
        table.add_row(
            variant,
            str(len(mine)),
            spread([r["before"] for r in mine], ".1%"),
            spread([r["after"] for r in mine], ".1%"),
            spread(rewards, ".3f"),
            f"{largest:.2g}",
            f"{statistics.median(r['seconds'] for r in mine):.0f}",
        )
    Console(width=140).print(table)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Rewards by step: each variant's mean over seeds, and the spread."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for variant in VARIANTS:
        curves = np.array(
            [
                [step["reward"] for step in run["steps"]]
                for run in runs
                if run["variant"] == variant
            ]
        )  # [seeds, steps]
        if not curves.size:
            continue
        steps = np.arange(1, curves.shape[1] + 1)
        (line,) = axes.plot(steps, curves.mean(0), label=variant)
        axes.fill_between(
            steps, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color()
        )
    axes.set_xlabel("step")
    axes.set_ylabel("reward")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--pretrain-lr", type=float, default=3e-4)
    parser.add_argument("--start-share", type=float, default=0.15, help="pretrained")
    parser.add_argument("--json", type=Path, help="add the results there")
    parser.add_argument("--plot", type=Path, help="draw all results of the file")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print("\n" + json.dumps(run(args.run[0], int(args.run[1]), args)), flush=True)
        os._exit(0)  # nothing is left to write, and shutting down takes seconds
    runs = []
    if args.json and args.json.exists():
        known = json.loads(args.json.read_text())["runs"]
        runs = [r for r in known if r["variant"] not in args.variants]
    for variant in args.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--run", variant]
        children = [
            subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE)
            for seed in args.seeds
        ]
        for seed, child in zip(args.seeds, children, strict=True):
            output, _ = child.communicate()
            if child.returncode:
                print(f"{variant}, seed {seed}: failed, see above")
                continue
            runs.append(last_json(output))
        if args.json:  # after each, as they take minutes
            text = json.dumps({"host": host(), "runs": runs}) + "\n"
            args.json.write_text(text)
    report(runs)
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
