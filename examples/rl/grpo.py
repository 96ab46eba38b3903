# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reinforcement learning on one module: it trains here, and vLLM samples from it.

    python examples/rl/grpo.py
    torchrun --nproc-per-node 2 examples/rl/grpo.py    # FSDP2; the first rank's engine
    torchrun --nproc-per-node 2 examples/rl/grpo.py --tensor-parallel

References: GRPO, https://arxiv.org/abs/2402.03300, without the division by the standard
deviation, https://arxiv.org/abs/2503.20783; RLOO, https://arxiv.org/abs/2402.14740
"""
# ruff: noqa: E402

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this process also trains
# The model is small, and the sums of one thread are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "RANK" not in os.environ:  # the engine is in this process, so that it starts sooner
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import torch.distributed as dist
from checkpoints import restore, save
from first_lesson import pretrain
from layouts import Layout, clip_gradients, layout_of_this_rank
from report import Report, show
from reverse_digits import (
    CONFIG,
    DIGITS,
    REWARDS,
    ReverseGPT,
    answer_to,
    logprobs_of,
    problems,
    prompts_of,
    text_of,
)
from torch import nn

from vllm_generic.rollout import RolloutConfig, VLLMModule

LARGEST_DIFFERENCE = 1e-4  # of log-probabilities, between engine and trainer


def advantages_of(rewards: torch.Tensor, algorithm: str) -> torch.Tensor:
    """How much better each answer is than the others to its prompt, `[prompts, n]`."""
    n = rewards.shape[1]
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    # RLOO compares with the mean of the other answers alone.
    return advantages * n / (n - 1) if algorithm == "rloo" else advantages


def answers_of(batch: dict) -> list[list[int]]:
    """What was sampled, without prompt and padding."""
    rows = zip(batch["all_tokens"].tolist(), batch["loss_mask"].bool(), strict=True)
    return [[t for t, s in zip(row, mask, strict=True) if s] for row, mask in rows]


def evaluate(policy: VLLMModule, count: int, shown: int = 4) -> float:
    """The share of held-out problems that are answered right, greedily."""
    prompts = prompts_of(problems(count, seed=0, held_out=True))
    answers = answers_of(policy.eval_forward({"input_ids": prompts}))
    right = [answer_to(p) == a for p, a in zip(prompts, answers, strict=True)]
    for prompt, answer, well in zip(prompts[:shown], answers, right, strict=False):
        show(f"    {text_of(prompt)}{text_of(answer)}  {'right' if well else 'wrong'}")
    return sum(right) / len(right)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    args: argparse.Namespace,
    layout: Layout,
) -> dict[str, float]:
    """Of this rank's rows of `batch`, `args.epochs` steps of the optimizer."""
    rows = slice(layout.rank, None, layout.ranks)
    tokens, mask = batch["all_tokens"][rows], batch["loss_mask"][rows, 1:]
    sampled = batch["logprobs"][rows]  # of the engine
    # FSDP takes the mean over ranks, and the loss is one over all tokens.
    tokens_per_rank = batch["loss_mask"][:, 1:].sum() / layout.ranks
    advantages = batch["advantages"][rows, None]
    difference, entropy = 0.0, 0.0
    for epoch in range(args.epochs):
        distribution = logprobs_of(model, tokens)[:, :-1]
        logprobs = distribution.gather(-1, tokens[:, 1:, None])[..., 0]
        if epoch == 0:
            with torch.no_grad():
                difference = ((logprobs - sampled) * mask).abs().max()
                each = -(distribution.exp() * distribution).sum(-1)
                entropy = (each * mask).sum() / tokens_per_rank
        ratio = (logprobs - sampled).exp()
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        (-(gain * mask).sum() / tokens_per_rank).backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if layout.parallel:
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        dist.all_reduce(entropy)
        entropy /= dist.get_world_size()
    if not difference <= LARGEST_DIFFERENCE:
        raise AssertionError(
            f"Engine and trainer differ by {difference:.2e} in log-probabilities; "
            f"expected at most {LARGEST_DIFFERENCE:.0e}."
        )
    return {"max |Δ log p|": float(difference), "entropy": float(entropy)}


def main(args: argparse.Namespace) -> int:
    layout = layout_of_this_rank(args.tensor_parallel)
    reward_of = REWARDS[args.reward]
    directory: Path = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(args.seed)
    model = ReverseGPT()
    if not args.resume:
        start = time.monotonic()
        steps = pretrain(model, args.start_share, args.pretrain_steps, args.seed)
        show(f"Pretrained for {steps} steps, {time.monotonic() - start:.0f} s.")
    layout.divide(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    done = restore(model, optimizer, directory) if args.resume else 0

    config = RolloutConfig(
        model=str(directory),
        load_format="dummy",  # the weights come from the trainer
        dtype="float32",
        n=args.answers,
        max_new_tokens=DIGITS + 1,
        eval_temperature=0.0,
        seed=args.seed,
        max_num_seqs=args.answers * args.prompts,
        kv_cache_memory_bytes=64 << 20,
        tensor_model_parallel_size=args.engine_ranks,
        enforce_eager=True,
        engine_args={"disable_log_stats": True},
    )
    policy = VLLMModule(config, lambda vllm_config, context: ReverseGPT())
    policy.setup()
    try:
        policy.parameter_sync(model)
        before = evaluate(policy, args.held_out)
        show(f"Before: {before:.1%} of {args.held_out} held-out problems are right.")
        with Report(directory, args.steps, done) as report:
            for step in range(done, args.steps):
                digits = problems(args.prompts, seed=10**6 * (args.seed + 1) + step)
                prompts = prompts_of(digits)
                with report.phase("rollout"):
                    batch = policy.forward_step({"input_ids": prompts}, iteration=step)
                    pairs = zip(batch["prompt_index"], answers_of(batch), strict=True)
                    rewards = torch.tensor([reward_of(prompts[i], a) for i, a in pairs])
                    grouped = rewards.view(len(prompts), args.answers)
                    advantages = advantages_of(grouped, args.algorithm)
                    batch["advantages"] = advantages.flatten()
                with report.phase("train"):
                    values = train_step(model, optimizer, batch, args, layout)
                with report.phase("sync"):
                    policy.parameter_sync(model)
                sampled = float(batch["loss_mask"].sum())
                values |= {"reward": float(rewards.mean())}
                values |= {"length": sampled / len(rewards)}
                report.add(step + 1, sampled, values)
                if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                    save(model, optimizer, directory / f"step_{step + 1}")
        after = evaluate(policy, args.held_out)
        show(f"After: {after:.1%} of {args.held_out} held-out problems are right.")
        result = {"before": before, "after": after, "held_out": args.held_out}
        (directory / "result.json").write_text(json.dumps(result))
        show(f"The curves and checkpoints are in {directory}/")
    finally:
        policy.close()
        if layout.parallel:
            dist.destroy_process_group()
    return 0 if after >= args.expect else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--steps", type=int, default=130)
    # The same number of answers teaches more if they are to more prompts.
    parser.add_argument("--prompts", type=int, default=128, help="in a step")
    parser.add_argument("--answers", type=int, default=4, help="to each prompt")
    parser.add_argument("--reward", choices=REWARDS, default="whole")
    parser.add_argument("--epochs", type=int, default=1, help="of each batch")
    parser.add_argument("--clip", type=float, default=0.2, help="of the ratio")
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-share", type=float, default=0.2, help="pretrained")
    parser.add_argument("--pretrain-steps", type=int, default=150, help="at most")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--engine-ranks", type=int, default=1)
    parser.add_argument("--tensor-parallel", action="store_true", help="not FSDP2")
    parser.add_argument("--save-every", type=int, default=40)
    parser.add_argument("--resume", action="store_true", help="a run")
    parser.add_argument("--expect", type=float, default=0.0, help="least final share")
    parser.add_argument("--output-dir", type=Path, default=Path("build/rl"))
    sys.exit(main(parser.parse_args()))
