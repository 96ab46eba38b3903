# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Many adapters at once: sampling, training, memory, and the service, with peers.

    python benchmarks/lora.py --json results.json          # tiny shapes, on a CPU
    python benchmarks/lora.py --shape 1b --json results.json                # on a GPU

- sampling: a plain module with LoRA, and vLLM's native class with vLLM's own LoRA, each
  beside the same engine without. An adapter is of rank 16 on all linear layers but the
  head. The plain module has one layer for q, k and v and one for gate and up; an
  adapter of the native class has a pair of factors for each of these.
- training: forward, backward and step of 8 adapters as the service does it on a GPU,
  and by eight passes with PEFT's `set_adapter` on the same Hugging Face model.
- service: saving weights for a sampler, and what a request costs beside its work: a
  step without gradients. Peer of the first: save, then `add_lora`. With `--skyrl`
  SkyRL's server gets the same requests.

Figures are medians. Every peer runs in the same run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import host, median_seconds
from llama import LLAMA_1B, LlamaShape
from lora_engines import Engine
from lora_service import service

TINY = LlamaShape(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1024,
    max_position_embeddings=2048,
)
SHAPES = {"tiny": TINY, "1b": replace(LLAMA_1B, max_position_embeddings=8192)}
# prompt and new tokens, requests at once
SAMPLING = {"tiny": ((16, 16), 32), "1b": ((512, 128), 256)}
TRAINING_LENGTHS = {"tiny": (32, 256), "1b": (512, 4096)}
ADAPTERS, RANK = 8, 32
PARTS = ("sampling", "training", "service")


# ---- Sampling ------------------------------------------------------------------------


def sampling(shape: str, repeats: int, on_gpu: bool) -> dict[str, Any]:
    tokens, at_once = SAMPLING[shape]
    common = {
        "shape": vars(SHAPES[shape]),
        "tokens": tokens,
        "at_once": at_once,
        "kv_cache_gb": 7,
    }
    results: dict[str, Any] = {}
    # adapters in a batch, by the number of slots
    cases = {0: (0,), 8: (0, 1, 8, 64), 64: (64,)}
    waiting = [
        (name, slots)
        for name in ("plain module", "native")
        for slots in cases
        if not (name == "native" and slots == 64)  # no target compares with it
    ]
    together = len(waiting) if on_gpu else 1  # a CPU has no room for more
    for first in range(0, len(waiting), together):
        engines = {
            (name, slots): Engine(native=name == "native", slots=slots, **common)
            for name, slots in waiting[first : first + together]
        }
        for (name, slots), engine in engines.items():
            try:
                engine.wait()
                rates = {
                    adapters: statistics.median(
                        [engine.rate(adapters) for _ in range(repeats + 1)][1:]
                    )
                    for adapters in cases[slots]
                }
                loading = (
                    statistics.median(engine.loading_time() for _ in range(3))
                    if slots
                    else None
                )
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            finally:
                engine.close()
            for adapters, rate in rates.items():
                results[f"{name}, {slots} slots, {adapters} adapters"] = rate
            if loading is not None:
                results[f"{name}, {slots} slots, save and add_lora, s"] = loading
            print(name, slots, rates, loading, flush=True)
    return results


# ---- Training ------------------------------------------------------------------------


def _hf_model(shape: LlamaShape, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = shape.config("LlamaForCausalLM")
    options.pop("torch_dtype")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**options), dtype=dtype)
    model.config.architectures = ["LlamaForCausalLM"]
    return model.eval().requires_grad_(False)


def _service_step(trainer: Any, batches: Mapping[str, Any], params: Any) -> None:
    trainer.forward_backward(batches)
    for run in batches:
        trainer.optim_step(run, params)


def training(shape: str, repeats: int, device: str) -> dict[str, Any]:
    import numpy as np

    from vllm.lora.adapter_trainer import AdamWParams
    from vllm_generic.tink.backends.base import Batch, Datum, LoraSpec
    from vllm_generic.tink.backends.hf_trainer import HFTrainer
    from vllm_generic.tink.backends.module_trainer import ModuleTrainer
    from vllm_generic.tink.backends.packed_model import copy_sharing_parameters, pack

    base = _hf_model(SHAPES[shape], device)
    ours = ModuleTrainer(pack(base), packed=True)
    peer = HFTrainer(copy_sharing_parameters(base))
    params = AdamWParams(learning_rate=1e-5)
    runs = [str(number) for number in range(ADAPTERS)]
    results: dict[str, Any] = {}
    for number, run in enumerate(runs):
        for trainer in (ours, peer):
            trainer.create(run, LoraSpec(RANK, seed=number, train_unembed=False))
    random = np.random.default_rng(0)
    for length in TRAINING_LENGTHS[shape]:
        batches = {}
        for run in runs:
            tokens = random.integers(0, SHAPES[shape].vocab_size, length + 1)
            inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, "f4")}
            batches[run] = Batch([Datum(tokens[:-1], inputs)], "cross_entropy")
        for name, trainer in (("together", ours), ("PEFT", peer)):
            try:
                seconds = median_seconds(
                    lambda t=trainer, b=batches: _service_step(t, b, params),
                    repeats,
                    device != "cpu",
                )
            except RuntimeError as error:  # out of memory
                print(f"{name}, {length} tokens: {error}", file=sys.stderr)
                continue
            results[f"{name}, {ADAPTERS} x {length} tokens, s"] = seconds
            print(name, length, seconds, flush=True)
    results["one more adapter, bytes"] = _bytes_of_an_adapter(ours)
    return results


def _bytes_of_an_adapter(trainer: Any) -> int:
    """Of the factors and of Adam's state, which a step has made."""
    own = trainer._trainer
    factors = own.adapters["0"].parameters()
    state = [
        value
        for moments in own._optimizers["0"].state.values()
        for value in moments.values()
    ]
    return sum(tensor.nbytes for tensor in [*factors, *state])


# ---- The service ---------------------------------------------------------------------


def served(shape: str, device: str, skyrl: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        _hf_model(SHAPES[shape], device).save_pretrained(folder)
        _tokenizer(folder)
        return service(folder, device, RANK, skyrl)


def _tokenizer(folder: Path) -> None:
    from vllm_generic.tink.backends.tiny_model import make_tokenizer

    make_tokenizer(folder)


# ---- Results -------------------------------------------------------------------------


def rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Measure, value, what it is compared with."""
    table = []
    rates = results.get("sampling", {})
    for name, rate in rates.items():
        engine = name.partition(",")[0]
        off = rates.get(f"{engine}, 0 slots, 0 adapters")
        if "add_lora" in name:
            table.append((name, f"{1000 * rate:.1f} ms", ""))
        elif off:
            table.append((name, f"{rate:,.0f} tok/s", f"{rate / off:.2f} x of off"))
    trained = results.get("training", {})
    for name, value in trained.items():
        if name.endswith("bytes"):
            table.append((name, f"{value / 1e9:.3f} GB", ""))
            continue
        ratio = ""
        peer = trained.get(name.replace("together", "PEFT"))
        if name.startswith("together") and peer:
            ratio = f"{peer / value:.2f} x PEFT's speed"
        table.append((name, f"{value:.3f} s", ratio))
    for name, value in results.get("service", {}).items():
        table.append((name, f"{1000 * value:.1f} ms", ""))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=2, help="timings of each (2)")
    parser.add_argument(
        "--skyrl", metavar="PYTHON", help="of an environment with skyrl-tx, as a peer"
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.table import Table

    head = host()
    device = "cpu" if head["gpu"] is None else "cuda"
    if args.shape == "tiny":
        torch.set_num_threads(1)  # so small products only lose by more
    results: dict[str, Any] = {**head, "shape": args.shape}
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "sampling": lambda: sampling(args.shape, args.repeats, device != "cpu"),
        "training": lambda: training(args.shape, args.repeats, device),
        "service": lambda: served(args.shape, device, args.skyrl),
    }
    for part in args.parts:
        results[part] = work[part]()
        if args.json:  # after each, as they take minutes
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("measure", "value", "compared", title=f"LoRA, shape {args.shape}")
    for row in rows(results):
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
