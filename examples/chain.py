# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The whole chain on a stock model: train, serve, sync, reinforce, adapt.

    python examples/chain.py                                # Transformers' Llama
    python examples/chain.py --model nanogpt                # or a GPT, or Megatron's
    python examples/chain.py --tensor-parallel-size 2       # of the engine
    torchrun --nproc-per-node 2 examples/chain.py           # FSDP2 as the trainer

The model is registered by one line. It is taught to reverse digits, served by `vllm
serve`, trained on by rewards while it serves, and then given an adapter for a second
task. At each joint the log-probabilities of both sides are compared. Takes a few
minutes on two CPU cores.
"""
# ruff: noqa: E402

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).with_name("chain_parts")))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from chain_adapters import Adapted, by_peft, by_tinker
from chain_logprobs import distance, farthest, logprobs_of
from chain_models import SUBJECTS, Subject, Weights
from chain_servers import sample, served
from chain_tasks import PROMPT, problems, reversed_digits
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

from vllm.distributed.weight_sync import WeightSync

LIMIT = 1e-4  # of |Δ log p|, in float32
RANK, RANKS = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))


# ---- The trainer


def pretrain(subject: Subject, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        prompts = problems(64, seed=step)
        tokens = torch.tensor([p + reversed_digits(p) for p in prompts])
        logits = subject.logits(model, tokens)[:, PROMPT - 1 : -1]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def grpo_step(
    subject: Subject,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: list[list[dict]],
) -> tuple[float, float]:
    """One step on sampled answers; the mean reward, and the largest |Δ log p|.

    Each rank of the trainer takes as many of the groups.
    """
    difference, loss = 0.0, torch.tensor(0.0)
    mine = groups[RANK::RANKS]
    for group in mine:
        mean = sum(row["reward"] for row in group) / len(group)
        every = logprobs_of(subject, model, group)
        for row, ours in zip(group, every, strict=True):
            difference = max(difference, distance(ours, row["logprobs"]))
            loss = loss - (row["reward"] - mean) * ours.sum()
    (loss / sum(map(len, mine))).backward()  # FSDP takes the mean over ranks
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    rewards = [row["reward"] for group in groups for row in group]
    return sum(rewards) / len(rewards), difference


def whole_weights(model: nn.Module) -> Weights:
    """The state dict of one process, on the first rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if value is not None}


def from_first(found: Any) -> Any:
    """What the first rank has found, on every rank."""
    box = [found]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    return box[0]


def largest(difference: float) -> float:
    """Over the ranks of the trainer."""
    found = torch.tensor(difference)
    if RANKS > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


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

    def show(self, title: str) -> None:
        table = Table(title=title)
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


def serve_and_reinforce(
    subject: Subject,
    model: nn.Module,
    directory: Path,
    args: argparse.Namespace,
    joints: Joints,
) -> None:
    held_out = problems(16, seed=10**6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    with ExitStack() as stack:
        url = ""
        if RANK == 0:
            server = served(subject, directory, args.tensor_parallel_size)
            url = stack.enter_context(server)

        def sampled(prompts: list[list[int]], n: int, t: float) -> list[list[dict]]:
            asked = [sample(url, p, n, t) for p in prompts] if RANK == 0 else None
            return from_first(asked)

        rows = [row for (row,) in sampled(held_out, 1, 1.0)]
        worst = largest(farthest(subject, model, rows))
        says = f"{args.pretrain_steps} steps of training, and the files are loaded"
        joints.add("trainer → vllm serve", worst, says)

        sync = WeightSync(model, [url] if RANK == 0 else None)
        worst, rewards = 0.0, []
        for step in range(args.steps):
            prompts = problems(args.prompts, seed=2 * 10**6 + step)
            groups = sampled(prompts, args.answers, 1.0)
            mean, difference = grpo_step(subject, model, optimizer, groups)
            worst, rewards = max(worst, largest(difference)), [*rewards, mean]
            version = sync.update()
        says = f"reward {rewards[0]:.2f} to {rewards[-1]:.2f}, version {version}"
        joints.add(f"{args.steps} GRPO steps", worst, says)

        rows = [row for (row,) in sampled(held_out, 1, 0.0)]
        sync.close()
    right = sum(row["reward"] == 1 for row in rows)
    says = f"{right} of {len(rows)} are reversed"
    worst = largest(farthest(subject, model, rows))
    joints.add("after the last update", worst, says)


def adapt(
    subject: Subject, weights: Weights, directory: Path, args: argparse.Namespace
) -> Adapted:
    steps, ranks = args.adapter_steps, args.tensor_parallel_size
    if args.model == "nanogpt":  # Hugging Face has no class for it
        model = subject.make()
        model.load_state_dict(weights)
        subject.save(weights, directory)
        return by_peft(subject, model, directory, steps, ranks)
    subject.save_for_service(weights, directory)
    trainer = ["--trainer=megatron"] if args.model == "megatron" else []
    return by_tinker(directory, steps, *trainer)


def main(args: argparse.Namespace) -> int:
    if RANKS > 1:
        if args.model == "megatron":
            raise SystemExit("--model megatron trains in one process: no torchrun.")
        if args.prompts % RANKS:
            raise SystemExit(f"--prompts has to be a multiple of {RANKS} ranks.")
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    joints = Joints()
    subject = SUBJECTS[args.model]()
    model = subject.make()
    pretrain(subject, model, args.pretrain_steps)
    if RANKS > 1:
        fully_shard(model)
    with tempfile.TemporaryDirectory(prefix="vllm-chain-") as name:
        weights = whole_weights(model)
        if RANK == 0:
            subject.save(weights, Path(name))
        serve_and_reinforce(subject, model, Path(name), args, joints)
        weights = whole_weights(model)
        if RANKS > 1:
            dist.destroy_process_group()
        if RANK > 0:
            return 0
        adapted = adapt(subject, weights, Path(name), args)
        joints.add("adapter: trainer → sampler", adapted.difference, adapted.says)
    trainer = f"trainer on {RANKS}, " if RANKS > 1 else ""
    joints.show(f"{args.model}: {trainer}engine on {args.tensor_parallel_size}")
    if args.json is not None:
        names = ("joint", "max_logprob_diff", "seconds", "says")
        rows = [dict(zip(names, row, strict=True)) for row in joints.rows]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if joints.hold else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SUBJECTS, default="llama")
    parser.add_argument("--pretrain-steps", type=int, default=70)
    parser.add_argument("--steps", type=int, default=10, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=16, help="in a step")
    parser.add_argument("--answers", type=int, default=8, help="to a prompt")
    parser.add_argument("--adapter-steps", type=int, default=100)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    sys.exit(main(parser.parse_args()))
