# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The whole chain on a stock model: train, serve, sync, reinforce, adapt.

    python examples/chain.py                                # Transformers' Llama
    python examples/chain.py --model nanogpt                # or a GPT, or Megatron's
    python examples/chain.py --tensor-parallel-size 2       # of the engine
    torchrun --nproc-per-node 2 examples/chain.py           # FSDP2 as the trainer
    python examples/chain.py --device cuda --shape 1b       # on a GPU

The model is registered by one line. It is taught to reverse digits, served by `vllm
serve`, trained on by rewards while it serves, and then given an adapter for a second
task. At each joint the log-probabilities of both sides are compared. Takes a few
minutes on two CPU cores.

With `--exact`, and always on a GPU, engine and trainer compute in the exact mode, and
nothing differs. On a GPU the model is in bfloat16 with float32 masters, and at last it
is quantized to fp8 and served again.
"""
# ruff: noqa: E402

import argparse
import json
import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
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
from chain_adapters import Adapted, by_hooks, by_tinker
from chain_logprobs import distance, farthest, logprobs_of
from chain_models import SHAPES, SUBJECTS, Subject, Weights
from chain_servers import sample, served
from chain_tasks import PROMPT, problems, reversed_digits
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vllm.distributed.weight_sync import WeightSync
from vllm.model_executor.models.adapter import use_vllm_attention
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.training.batch_invariance import batch_invariant

LIMIT = 1e-4  # of |Δ log p|, in float32
RANK, RANKS = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# ---- The trainer


def as_served(model: nn.Module) -> nn.Module:
    """With the engine's attention, and sums in the order of any number of its ranks."""
    return sum_as_divided(use_vllm_attention(model))


def trainer_on_gpu(subject: Subject) -> nn.Module:
    """Under FSDP2, also alone: it keeps float32 masters and computes in bfloat16."""
    with torch.device("cuda"):
        model = as_served(subject.make())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return fully_shard(model, mp_policy=policy)


def pretrain(subject: Subject, model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=subject.shape.pretrain_lr)
    device = next(model.parameters()).device
    for step in range(steps):
        prompts = problems(64, seed=step)
        tokens = torch.tensor([p + reversed_digits(p) for p in prompts], device=device)
        logits = subject.logits(model, tokens)[:, PROMPT - 1 : -1].float()
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
    difference, loss = 0.0, torch.zeros((), device=next(model.parameters()).device)
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
    """What was compared where two parts meet.

    Args:
        limit: the most that |Δ log p| may be, if `add` is not told another one.
        path: where the rows are kept as JSON, after each, as they take minutes.

    """

    def __init__(self, limit: float, path: Path | None) -> None:
        self.rows: list[tuple[str, float, float, str]] = []
        self.hold, self._limit, self._path = True, limit, path
        self._since = time.perf_counter()

    def add(
        self, name: str, difference: float, says: str, limit: float | None = None
    ) -> None:
        limit = self._limit if limit is None else limit
        if not difference <= limit:
            self.hold, says = False, f"FAILED, at most {limit:.0e} is right; {says}"
        now = time.perf_counter()
        self.rows.append((name, difference, now - self._since, says))
        self._since = now
        if RANK == 0:  # the next joint may be a minute away
            print(f"{name}: {difference:.1e}, {says}", flush=True)
            if self._path is not None:
                names = ("joint", "max_logprob_diff", "seconds", "says")
                rows = [dict(zip(names, row, strict=True)) for row in self.rows]
                self._path.write_text(json.dumps(rows, indent=1) + "\n")

    def show(self, title: str) -> None:
        table = Table(title=title)
        for name in ("joint", "max |Δ log p|", "seconds", ""):
            table.add_column(name)
        for name, difference, seconds, says in self.rows:
            table.add_row(name, f"{difference:.1e}", f"{seconds:.0f}", says)
        Console().print(table)


# ---- The chain


def serve_and_reinforce(
    subject: Subject,
    model: nn.Module,
    directory: Path,
    args: argparse.Namespace,
    joints: Joints,
) -> None:
    held_out = problems(16, seed=10**6)
    lr = subject.shape.lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
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
        with torch.device(args.device):
            model = subject.make()
        model.load_state_dict(weights)
        model.to(getattr(torch, subject.dtype))
        if args.exact:
            model = as_served(model)
        subject.save(weights, directory)
        return by_hooks(subject, model, directory, steps, ranks)
    subject.save_for_service(weights, directory)
    options = [f"--device={args.device}"]
    options += ["--trainer=megatron"] if args.model == "megatron" else []
    return by_tinker(directory, steps, subject.shape.adapter_lr, *options)


def quantize(
    subject: Subject, model: nn.Module, directory: Path, ranks: int
) -> tuple[float, str]:
    """The largest |Δ log p| of fp8 beside the trainer, and what was answered."""
    found = None
    if RANK == 0:
        with served(subject, directory, ranks, "--quantization=fp8") as url:
            prompts = problems(16, seed=10**6)
            found = [sample(url, prompt, 1, 0.0)[0] for prompt in prompts]
    rows = from_first(found)
    right = sum(row["reward"] == 1 for row in rows)
    worst = largest(farthest(subject, model, rows))
    return worst, f"{right} of {len(rows)} are reversed"


def run(args: argparse.Namespace) -> Joints:
    """All of it; the report is complete on the first rank."""
    on_gpu = args.device == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    subject = SUBJECTS[args.model](SHAPES[args.shape], dtype)
    torch.manual_seed(args.seed)
    joints = Joints(0.0 if args.exact else LIMIT, args.json)
    if on_gpu:
        model = trainer_on_gpu(subject)
    else:
        model = as_served(subject.make()) if args.exact else subject.make()
    pretrain(subject, model, args.pretrain_steps)
    if RANKS > 1 and not on_gpu:
        fully_shard(model)
    with tempfile.TemporaryDirectory(prefix="vllm-chain-") as name:
        weights = whole_weights(model)
        if RANK == 0:
            subject.save(weights, Path(name))
        serve_and_reinforce(subject, model, Path(name), args, joints)
        weights = whole_weights(model)
        if RANK == 0:
            adapted = adapt(subject, weights, Path(name), args)
            joints.add("adapter: trainer → sampler", adapted.difference, adapted.says)
            subject.save(weights, Path(name))
        if on_gpu and args.model != "megatron":  # whose layers take no quantization
            ranks = args.tensor_parallel_size
            worst, says = quantize(subject, model, Path(name), ranks)
            joints.add("quantized to fp8", worst, says, limit=math.inf)
    return joints


def main(args: argparse.Namespace) -> int:
    on_gpu = args.device == "cuda"
    args.exact |= on_gpu
    if RANKS > 1 and args.model == "megatron":
        raise SystemExit("--model megatron trains in one process: no torchrun.")
    if args.prompts % RANKS:
        raise SystemExit(f"--prompts has to be a multiple of {RANKS} ranks.")
    if RANKS > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    elif on_gpu:
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl", **alone)
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)
    try:
        with batch_invariant() if args.exact else nullcontext():
            joints = run(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if RANK > 0:
        return 0
    trainer = f"trainer on {RANKS}, " if RANKS > 1 else ""
    joints.show(f"{args.model}: {trainer}engine on {args.tensor_parallel_size}")
    return 0 if joints.hold else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SUBJECTS, default="llama")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the Llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--exact", action="store_true", help="compare bits")
    parser.add_argument("--pretrain-steps", type=int, default=70)
    parser.add_argument("--steps", type=int, default=10, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=16, help="in a step")
    parser.add_argument("--answers", type=int, default=8, help="to a prompt")
    parser.add_argument("--adapter-steps", type=int, default=100)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    sys.exit(main(parser.parse_args()))
