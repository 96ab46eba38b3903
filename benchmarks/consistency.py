# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How far log-probabilities of engine and trainer are apart, and what exactness costs.

    python benchmarks/consistency.py --json results.json --plot consistency.png

All modes have the same random weights, and each runs in its own process: vLLM's native
Llama with a Hugging Face trainer, and a PyTorch Llama that trains and serves, by
default and with `VLLM_BATCH_INVARIANT=1`, each with heads of 64 and of 128. Prompts of
mixed lengths are served greedily and sampled, with chunked prefill, prefix caching and
CUDA graphs. In one mode the cache is too small, so that requests are preempted; in one
the engine, in a process of its own, is updated by `WeightSync`, and compared after 1,
10 and 100 updates. In some the engine is on two GPUs and the trainer on one, and sums
are added in a tree, or as they were before ("one leaf"). Modes with TP=2 need two
NVIDIA GPUs, the others one.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import host, last_json
from llama import DIVIDED, LLAMA_1B, LLAMA_1B_HEAD_128, Llama, LlamaShape
from safetensors.torch import save_file

SHAPES = {64: LLAMA_1B, 128: LLAMA_1B_HEAD_128}
MODES = {
    "native + Hugging Face": {"native": True},
    "one module": {},
    "one module, invariant": {"invariant": True},
    "one module, invariant, preempted": {"invariant": True, "preempted": True},
    "one module, invariant, TP=2": {"invariant": True, "tp_size": 2},
    "one module, invariant, updated": {"invariant": True, "updates": (1, 10, 100)},
    # The cost of sums in a tree: the same layouts without, and on one GPU with it.
    "one module, invariant, TP=2, one leaf": {
        "invariant": True,
        "tp_size": 2,
        "leaves": 1,
    },
    "one module, invariant, as divided": {"invariant": True, "as_divided": True},
    "engine TP=2, trainer on one GPU": {"tp_size": 2, "trainer_alone": True},
    "engine TP=2, trainer on one GPU, invariant": {
        "invariant": True,
        "tp_size": 2,
        "trainer_alone": True,
    },
    "engine TP=2, trainer on one GPU, one leaf": {
        "invariant": True,
        "tp_size": 2,
        "trainer_alone": True,
        "leaves": 1,
    },
}
PROMPTS, NEW_TOKENS, MAX_MODEL_LEN = 256, 64, 4096
STEP_TOKENS = 16384


def save_checkpoint(head_dim: int, directory: Path) -> None:
    """Random weights, scaled so that the model's choices are decided."""
    shape = SHAPES[head_dim]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Llama(shape).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05 if "lm_head" in name else 0.02)
    weights = {name: x.cpu().clone() for name, x in model.checkpoint().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def random_prompts(vocab: int) -> list[list[int]]:
    """Lengths from 5 to 1,500; a quarter share a prefix, for the prefix cache."""
    generator = random.Random(0)
    shared = [generator.randrange(2, vocab) for _ in range(200)]
    prompts = []
    for index in range(PROMPTS):
        length = int(min(1500, 5 + generator.expovariate(1 / 250)))
        tokens = [generator.randrange(2, vocab) for _ in range(length)]
        prompts.append(shared + tokens if index % 4 == 0 else tokens)
    return prompts


class OwnTrainer:
    """The served module itself, outside an engine step."""

    def __init__(self, model: Llama, invariant: bool) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.training import batch_invariance

        self.model = model
        self.log_probs = batch_invariance.token_log_probs
        self.context = batch_invariance.batch_invariant if invariant else nullcontext
        self.logits: Any = model.lm_head
        if isinstance(model.lm_head, ParallelLMHead):
            self.logits = partial(
                LogitsProcessor(model.shape.vocab_size), model.lm_head
            )

    def __call__(self, sequences: list[list[int]]) -> torch.Tensor:
        """Log-probabilities of every token but each first, `[tokens - sequences]`."""
        from vllm.model_executor.layers.trainable_attention import packed_sequences

        lengths = [len(sequence) for sequence in sequences]
        ids = torch.tensor(sum(sequences, []), device="cuda")
        positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        with self.context(), packed_sequences(cu_seqlens):
            hidden = self.model(ids, positions)
            keep = torch.ones(len(ids), dtype=torch.bool, device="cuda")
            keep[cu_seqlens[1:].long() - 1] = False
            targets = ids[1:][keep[:-1]]
            return self.log_probs(self.logits(hidden[keep]), targets)


def recompute(trainer: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the new tokens, `[sequences, NEW_TOKENS]`."""
    with torch.no_grad():
        return torch.stack([trainer([s])[-NEW_TOKENS:].cpu() for s in sequences])


def trainer_alone(head_dim: int, directory: str, invariant: bool) -> "OwnTrainer":
    """A trainer on one GPU; if invariant, it sums as the ranks of its engine do."""
    from safetensors.torch import load_file

    from vllm.model_executor.models.plans.whole import sum_as_divided

    with torch.device("cuda"):
        model = Llama(SHAPES[head_dim]).to(torch.bfloat16)
    model.load_weights(load_file(Path(directory) / "model.safetensors").items())
    sum_as_divided(model, DIVIDED)
    return OwnTrainer(model, invariant)


def recompute_in_parallel(
    rank: int, tp_size: int, head_dim: int, directory: str, sequences: list[list[int]]
) -> None:
    """One rank of a trainer that is divided as its engine is."""
    from safetensors.torch import load_file

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.parallel_context import ParallelContext
    from vllm.training import batch_invariance

    torch.cuda.set_device(rank)
    config = VllmConfig()
    with (
        batch_invariance.batch_invariant(),
        set_current_vllm_config(config),
    ):
        parallel_state.set_custom_all_reduce(False)
        store = f"file://{directory}/trainer-store"
        parallel_state.init_distributed_environment(
            tp_size, rank, distributed_init_method=store, local_rank=rank
        )
        parallel_state.initialize_model_parallel(tp_size)
        context = ParallelContext(
            tensor_parallel_size=tp_size, tensor_parallel_rank=rank
        )
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = Llama(SHAPES[head_dim], context)
        model.load_weights(load_file(Path(directory) / "model.safetensors").items())
        torch.set_default_dtype(torch.float32)
        values = recompute(OwnTrainer(model, invariant=True), sequences)
        if rank == 0:
            torch.save(values, Path(directory) / "recomputed.pt")
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


class HuggingFaceTrainer:
    """Transformers' Llama on padded rows."""

    def __init__(self, directory: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            directory, torch_dtype=torch.bfloat16
        ).cuda()

    def __call__(self, sequences: list[list[int]]) -> torch.Tensor:
        values = []
        for sequence in sequences:
            ids = torch.tensor([sequence], device="cuda")
            logits = self.model(ids).logits[0, :-1].float()
            targets = ids[0, 1:, None]
            values.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
        return torch.cat(values)


def run(mode: str, head_dim: int, directory: str) -> dict[str, Any]:
    """One row of the results, in its own process."""
    options = MODES[mode]
    invariant = options.get("invariant", False)
    updates = options.get("updates", ())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(bool(updates)))
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if "leaves" in options:
        os.environ["VLLM_BATCH_INVARIANT_LEAVES"] = str(options["leaves"])
    from vllm import LLM, ModelRegistry, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    shape = SHAPES[head_dim]
    native = options.get("native", False)
    architecture = "LlamaForCausalLM" if native else "PlainLlama"
    tp_size = options.get("tp_size", 1)
    build: Any = Llama
    if options.get("as_divided"):
        from vllm.model_executor.models.plans.whole import sum_as_divided

        def build(shape: LlamaShape, context: Any) -> Llama:
            model = Llama(shape, context)
            sum_as_divided(model, DIVIDED)
            return model

    if not native:
        ModelRegistry.register_model(architecture, lambda c, p: build(shape, p))
    config = Path(directory) / "config.json"
    config.write_text(json.dumps(shape.config(architecture)))
    arguments: dict[str, Any] = {}
    if options.get("preempted"):
        arguments["num_gpu_blocks_override"] = 2000
    llm = LLM(
        model=directory,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.25,  # the trainer beside it needs 45 GiB
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        # Steps of every size as CUDA graphs: launching a product costs the host more
        # with the settings of cuBLAS that keep the bits.
        compilation_config={"max_cudagraph_capture_size": 2048},
        tensor_parallel_size=tp_size,
        disable_log_stats=False,
        **arguments,
    )
    prompts = [{"prompt_token_ids": p} for p in random_prompts(shape.vocab_size)]

    def generate(temperature: float, count: int) -> Any:
        params = SamplingParams(
            temperature=temperature,
            max_tokens=NEW_TOKENS,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            seed=0,
        )
        return llm.generate(prompts[:count], params, use_tqdm=False)

    def sample() -> tuple[list[list[int]], torch.Tensor]:
        outputs = [o for count in (1, 7, PROMPTS) for o in generate(0.0, count)]
        outputs += generate(1.0, PROMPTS)
        return sequences_of(outputs), log_probs_of(outputs)

    generate(0.0, 8)
    compared = []
    if updates:
        compared = compare_after_updates(llm, sample, head_dim, directory, updates)
    else:
        sequences, served = sample()
    rates = []
    for _ in range(3):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        generate(1.0, PROMPTS)
        rates.append(PROMPTS * NEW_TOKENS / (time.perf_counter() - start))

    preemptions = sum(
        metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:num_preemptions"
    )
    trainer: Any = None
    if updates:
        recomputed, served = map(torch.cat, zip(*compared, strict=True))
    elif options.get("trainer_alone"):
        del llm
        cleanup_dist_env_and_memory()
        trainer = trainer_alone(head_dim, directory, invariant)
        recomputed = recompute(trainer, sequences)
    elif tp_size > 1:
        del llm
        cleanup_dist_env_and_memory()
        torch.multiprocessing.spawn(
            recompute_in_parallel, (tp_size, head_dim, directory, sequences), tp_size
        )
        recomputed = torch.load(Path(directory) / "recomputed.pt", weights_only=True)
    else:
        if native:
            trainer = HuggingFaceTrainer(directory)
        else:
            module = llm.apply_model(lambda model: model.module)[0]
            trainer = OwnTrainer(module, invariant)
        recomputed = recompute(trainer, sequences)
    difference = (recomputed.double() - served).abs().flatten()
    result = {
        "mode": mode,
        "head_dim": head_dim,
        "tokens": difference.numel(),
        "equal": int((difference == 0).sum()),
        "max": float(difference.max()),
        "mean": float(difference.mean()),
        "histogram": histogram(difference),
        "preemptions": int(preemptions),
        "serving_tokens_per_s": statistics.median(rates),
    }
    if isinstance(trainer, OwnTrainer):
        result["step_ms"] = step_ms(trainer, shape.vocab_size)
    return result


def sequences_of(outputs: list[Any]) -> list[list[int]]:
    """Prompts with what was generated."""
    return [o.prompt_token_ids + list(o.outputs[0].token_ids) for o in outputs]


def log_probs_of(outputs: list[Any]) -> torch.Tensor:
    """Of the new tokens, as the engine returned them, `[sequences, NEW_TOKENS]`."""
    values = [
        [
            entry[token].logprob
            for entry, token in zip(
                output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
            )
        ]
        for output in outputs
    ]
    return torch.tensor(values, dtype=torch.float64)


def compare_after_updates(
    llm: Any,
    sample: Callable[[], tuple[list[list[int]], torch.Tensor]],
    head_dim: int,
    directory: str,
    counts: Sequence[int],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The trainer's and the engine's log-probabilities after so many updates each."""
    from safetensors.torch import load_file

    from vllm.distributed.weight_sync import WeightSync

    with torch.device("cuda"):
        model = Llama(SHAPES[head_dim]).to(torch.bfloat16)
    model.load_weights(load_file(Path(directory) / "model.safetensors").items())
    trainer = OwnTrainer(model, invariant=True)
    sync = WeightSync(model, llm)
    compared = []
    for number in range(1, max(counts) + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        sync.update()
        if number in counts:
            sequences, served = sample()
            compared.append((recompute(trainer, sequences), served))
    sync.close()
    return compared


def step_ms(trainer: OwnTrainer, vocab: int) -> float:
    """Median ms of a forward and backward over packed sequences of 1,024."""
    generator = random.Random(1)
    sequences = [
        [generator.randrange(vocab) for _ in range(1024)]
        for _ in range(STEP_TOKENS // 1024)
    ]
    trainer.model.requires_grad_(True)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with trainer.context():
            trainer(sequences).mean().backward()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
        trainer.model.zero_grad(set_to_none=True)
    return statistics.median(times[2:])


BINS = [0.0, *(10.0**exponent for exponent in range(-8, 1))]


def histogram(difference: torch.Tensor) -> list[int]:
    """Counts of 0, then of each decade up to 1."""
    counts = [int((difference == 0).sum())]
    for low, high in zip(BINS[:-1], BINS[1:], strict=True):
        counts.append(int(((difference > low) & (difference <= high)).sum()))
    return counts


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of tokens by |Δ log p|, a line a mode."""
    import matplotlib.pyplot as plt

    labels = ["0"] + [f"≤1e{exponent}" for exponent in range(-8, 1)]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        shares = [count / row["tokens"] for count in row["histogram"]]
        places = [place + index * width for place in range(len(labels))]
        name = f"{row['mode']}, heads of {row['head_dim']}"
        axes.bar(places, shares, width, label=name)
    axes.set_xticks([place + 0.4 for place in range(len(labels))], labels)
    axes.set_xlabel("|Δ log p| of a token, engine against trainer")
    axes.set_ylabel("share of tokens")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="write the distribution there")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=sorted(SHAPES))
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        mode, head_dim, directory = args.run
        print("\n" + json.dumps(run(mode, int(head_dim), directory)))
        return

    from rich.console import Console
    from rich.table import Table

    results: dict[str, Any] = {
        **host(),
        "rows": [],
    }
    rows = results["rows"]
    for head_dim in args.head_dims:
        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(head_dim, Path(directory))
            torch.cuda.empty_cache()
            for mode in args.modes:
                command = [sys.executable, __file__, "--run", mode, str(head_dim)]
                child = subprocess.run([*command, directory], stdout=subprocess.PIPE)
                if child.returncode:
                    print(f"{mode}, heads of {head_dim}: failed, see above")
                    continue
                rows.append(last_json(child.stdout))
                if args.json:  # after each, as they take minutes
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title="engine against trainer")
    for column in ("mode", "heads of", "equal", "max |Δ log p|", "mean |Δ log p|"):
        table.add_column(column)
    for column in ("preemptions", "serving, tok/s", "step, ms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["mode"],
            str(row["head_dim"]),
            f"{row['equal']} of {row['tokens']}",
            f"{row['max']:.2g}",
            f"{row['mean']:.2g}",
            str(row["preemptions"]),
            f"{row['serving_tokens_per_s']:,.0f}",
            f"{row['step_ms']:.0f}" if "step_ms" in row else "",
        )
    Console(width=140).print(table)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
