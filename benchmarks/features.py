# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Speed of quantization and speculation with one Llama-3.2-1B shape, as two models.

    python benchmarks/features.py [--features fp8 n-grams] [--json results.json]

vLLM's native class and a plain PyTorch module around `TrainableAttention` load the same
random weights. For each feature both engines are started, and then timed in turns. The
table has the rates, the share of drafted tokens that were accepted, and the agreement
with the same class without the feature: the share of prompts with the same next token,
and of greedy continuations that are equal. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from harness import Child, generation_rate, host, random_prompts
from llama import LLAMA_1B, Llama, LlamaShape

MODELS = ("native", "plain module")
PLAIN = "none"
FEATURES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "fp8": {"quantization": "fp8"},
    "fp8 per channel": {"quantization": "fp8_per_channel"},
    "n-grams": {"method": "ngram", "prompt_lookup_max": 3},
    "draft model": {"method": "draft_model"},
}
SPECULATIVE_TOKENS = 3
DRAFT, FIRST_LAYERS = LlamaShape(num_hidden_layers=4), "[0-3]"
PROMPT_TOKENS, NEW_TOKENS, AT_ONCE = 512, 128, 128
# Each of so many prompts is continued by one token, and some by more.
NEXT_PROMPTS, NEXT_PROMPT_TOKENS, LONGER = 2048, 32, 64
MEMORY = 0.4


class Engine(Child):
    """An engine in its own process, which answers each line of JSON."""

    def __init__(self, model: str, feature: str, directory: Path) -> None:
        super().__init__(__file__, "--serve", model, feature, str(directory))

    def rate(self, requests: int) -> float:
        """New tokens a second, of `requests` at once."""
        return self.ask(json.dumps({"rate": requests}))

    def accepted(self) -> float:
        """Share of the drafted tokens that were accepted until now, or NaN."""
        return self.ask(json.dumps({"accepted": True}))

    def write_tokens(self, path: Path) -> None:
        """Next tokens of many prompts, and greedy continuations of some."""
        self.ask(json.dumps({"tokens": str(path)}))


def save_checkpoints(directory: Path) -> None:
    """The target, with some tokens much likelier than others, and its first layers."""
    import torch
    from safetensors.torch import save_file

    torch.set_default_dtype(torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        model = Llama(LLAMA_1B)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # [outputs, inputs]
            scale = 2.0 * parameter.shape[-1] ** -0.5
            parameter.detach().normal_(std=scale, generator=generator)
    model.model.embed_tokens.weight.detach().normal_(generator=generator)
    weights = {name: x.cpu().clone() for name, x in model.checkpoint().items()}
    left_out = re.compile(rf"model\.layers\.(?!{FIRST_LAYERS}\.)")
    for name, shape in (("target", LLAMA_1B), ("draft", DRAFT)):
        folder = directory / name
        folder.mkdir()
        if name == "draft":
            weights = {k: v for k, v in weights.items() if not left_out.match(k)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = shape.config("LlamaForCausalLM")
        (folder / "config.json").write_text(json.dumps(config))


def options_of(feature: str, directory: Path) -> dict[str, Any]:
    options = dict(FEATURES[feature])
    if "method" not in options:
        return options
    if feature == "draft model":
        options["model"] = str(directory / "draft")
    options["num_speculative_tokens"] = SPECULATIVE_TOKENS
    return {"speculative_config": options}


def serve(model: str, feature: str, directory: Path) -> None:
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    from vllm import LLM, ModelRegistry, SamplingParams

    overrides: dict[str, Any] = {}
    if model == "plain module":
        ModelRegistry.register_model("PlainLlama", lambda c, p: Llama(LLAMA_1B))
        overrides = {"architectures": ["PlainLlama"]}
    llm = LLM(
        model=str(directory / "target"),
        hf_overrides=overrides,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        enable_prefix_caching=False,
        gpu_memory_utilization=MEMORY,
        disable_log_stats=False,
        **options_of(feature, directory),
    )
    print("= 0", flush=True)
    # Half of each prompt repeats the other half, which n-grams may find.
    prompts = random_prompts(LLAMA_1B.vocab_size, PROMPT_TOKENS // 2, AT_ONCE)
    for prompt in prompts:
        prompt["prompt_token_ids"] *= 2
    next_prompts = random_prompts(LLAMA_1B.vocab_size, NEXT_PROMPT_TOKENS, NEXT_PROMPTS)

    def greedy(prompts: list[Any], count: int) -> list[list[int]]:
        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    for line in sys.stdin:
        asked = json.loads(line)
        answer = 0.0
        if "rate" in asked:
            answer = generation_rate(llm, prompts[: asked["rate"]], NEW_TOKENS)
        elif "accepted" in asked:
            counters = {metric.name: metric for metric in llm.get_metrics()}
            drafted, accepted = (
                getattr(counters.get(f"vllm:spec_decode_num_{kind}_tokens"), "value", 0)
                for kind in ("draft", "accepted")
            )
            answer = accepted / drafted if drafted else float("nan")
        else:
            tokens = {
                "next": greedy(next_prompts, 1),
                "longer": greedy(prompts[:LONGER], NEW_TOKENS),
            }
            Path(asked["tokens"]).write_text(json.dumps(tokens))
        print(f"= {answer}", flush=True)


def agreement(path: Path, other: Path) -> dict[str, float]:
    """Shares of equal entries of two files of tokens."""
    first, second = (json.loads(p.read_text()) for p in (path, other))
    return {
        kind: statistics.mean(
            a == b for a, b in zip(first[kind], second[kind], strict=True)
        )
        for kind in first
    }


def measure(
    feature: str, turns: int, directory: Path, tokens: Path
) -> list[dict[str, Any]]:
    """Start both models with `feature`, and time them in turns."""
    rows = []
    with ExitStack() as stack:
        engines = {}
        for model in MODELS:
            engine = stack.enter_context(closing(Engine(model, feature, directory)))
            engine.answer()
            engines[model] = engine
        rates: dict[str, dict[int, list[float]]]
        rates = {model: {AT_ONCE: [], 1: []} for model in MODELS}
        for turn in range(-1, turns):  # the first is a warm-up
            for model in MODELS[:: 1 if turn % 2 else -1]:
                for requests, found in rates[model].items():
                    rate = engines[model].rate(requests)
                    if turn >= 0:
                        found.append(rate)
        for model, engine in engines.items():
            engine.write_tokens(tokens / f"{model} {feature}")
            row = {"feature": feature, "model": model}
            row |= {"at_once": rates[model][AT_ONCE], "alone": rates[model][1]}
            row |= {"accepted": engine.accepted()}
            wanted, got = (tokens / f"{model} {name}" for name in (PLAIN, feature))
            rows.append(row | agreement(wanted, got))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--turns", type=int, default=5, help="timings of each (5)")
    parser.add_argument(
        "--features", nargs="+", choices=FEATURES, default=list(FEATURES)
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        model, feature, directory = args.serve
        serve(model, feature, Path(directory))
        return

    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_checkpoints(directory)
        others = [name for name in args.features if name != PLAIN]
        for feature in [PLAIN, *others]:  # the one that others are compared with
            rows += measure(feature, args.turns, directory, directory)
            if args.json:  # after each, as they take minutes
                results = {**host(), "rows": rows}
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(
        title=f"Llama-3.2-1B shape, {PROMPT_TOKENS} tokens in, {NEW_TOKENS} out"
    )
    table.add_column("feature")
    table.add_column("model")
    titles = (f"{AT_ONCE} at once, tok/s", "alone, tok/s", "accepted")
    for title in (*titles, "next token equal", "continuation equal"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["feature"],
            row["model"],
            *(f"{statistics.median(row[key]):,.0f}" for key in ("at_once", "alone")),
            *(f"{row[key]:.1%}" for key in ("accepted", "next", "longer")),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
