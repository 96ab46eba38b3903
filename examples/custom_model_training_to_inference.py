# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train a small GPT, serve the same module with vLLM, and prove both agree.

    python examples/custom_model_training_to_inference.py

There is one module. It trains with PyTorch on real English for 90 seconds, and
vLLM samples from it with paged attention and continuous batching. The exit code is
not 0 if the two disagree on a single token.
"""
# ruff: noqa: E402

import argparse
import json
import math
import os
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that it starts sooner
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this process also trains
warnings.filterwarnings("ignore", module=r"vllm\.")

import matplotlib
import torch
import torch.nn.functional as F
from english_corpus import read_paragraphs, train_tokenizer
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.layers import TrainableFlashAttention
from vllm.model_validation import validate

CONFIG = {
    "architectures": ["EnglishGPT"],
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
TRAIN_SEQ, TRAIN_BATCH, PEAK_LR, WARMUP_STEPS = 128, 8, 5e-3, 30


class Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(hidden_size)
        self.attn = TrainableFlashAttention(hidden_size, num_heads, rope_theta=1e4)
        self.mlp_norm = nn.RMSNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))


class EnglishGPT(nn.Module):
    """Tokens `[batch, seq]` in training, `[tokens]` in vLLM -> hidden states."""

    def __init__(self, config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config.hidden_size, config.num_attention_heads)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.embedding.weight)


def logits_of(model: EnglishGPT, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[..., seq, vocab]` of whole sequences `[..., seq]`, without an engine."""
    hidden_states = model(token_ids, torch.arange(token_ids.shape[-1]))
    return model.compute_logits(hidden_states)


def loss_of(model: EnglishGPT, chunks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, in nats, of each next token in `chunks` `[batch, seq + 1]`."""
    logits = logits_of(model, chunks[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), chunks[:, 1:].flatten())


def train(
    model: EnglishGPT, tokens: torch.Tensor, seconds: float
) -> list[tuple[float, float]]:
    """Train for `seconds` and return the loss curve as (seconds, loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    curve: list[tuple[float, float]] = []
    start = time.monotonic()
    with tqdm(total=round(seconds), unit="s", desc="training", disable=None) as bar:
        while (elapsed := time.monotonic() - start) < seconds:
            cosine = 0.5 * (1 + math.cos(math.pi * elapsed / seconds))
            warmup = min(1.0, (len(curve) + 1) / WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * warmup * (0.02 + 0.98 * cosine)
            starts = torch.randint(len(tokens) - TRAIN_SEQ, (TRAIN_BATCH,))
            chunks = torch.stack([tokens[s : s + TRAIN_SEQ + 1] for s in starts])
            loss = loss_of(model, chunks)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append((elapsed, loss.item()))
            bar.set_postfix(step=len(curve), loss=f"{loss.item():.2f}", refresh=False)
            bar.update(round(elapsed) - bar.n)
    return curve


def show_loss(curve: list[tuple[float, float]], path: Path) -> None:
    """Print the loss curve, and save it as a picture."""
    rows = 12
    for row in range(rows):
        part = curve[row * len(curve) // rows : (row + 1) * len(curve) // rows]
        if part:
            loss = sum(value for _, value in part) / len(part)
            print(f"{part[-1][0]:6.1f} s  {loss:5.2f}  {'█' * round(8 * loss)}")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.plot(*zip(*curve, strict=True))
    plt.xlabel("seconds of training")
    plt.ylabel("cross-entropy, nats per token")
    plt.savefig(path)


def main(args: argparse.Namespace) -> int:
    directory: Path = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    # ---- Real text ----
    paragraphs = read_paragraphs()
    held_out = paragraphs[::20]
    training = [text for text in paragraphs if text not in held_out]
    tokenizer = train_tokenizer(training, CONFIG["vocab_size"], directory)

    def encode(texts: list[str]) -> torch.Tensor:
        joined = tokenizer.eos_token.join(texts)
        return torch.tensor(tokenizer(joined)["input_ids"])

    # ---- Train ----
    model = EnglishGPT(SimpleNamespace(**CONFIG))
    tokens = encode(training)
    print(
        f"Training {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters "
        f"on {len(tokens)} tokens of Python's manual for {args.train_seconds:g} s ..."
    )
    curve = train(model, tokens, args.train_seconds)
    model.eval()
    show_loss(curve, directory / "loss.png")
    with torch.no_grad():
        chunks = encode(held_out).unfold(0, TRAIN_SEQ + 1, TRAIN_SEQ)
        print(f"Loss on paragraphs held out: {loss_of(model, chunks).item():.2f}")

    # ---- Save ----
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))

    # ---- Serve the same module ----
    print("\nServing it with vLLM ...")
    ModelRegistry.register_model(
        "EnglishGPT",
        lambda vllm_config, parallel_context: EnglishGPT(
            vllm_config.model_config.hf_config
        ),
    )
    llm = LLM(
        model=str(directory),
        dtype="float32",
        max_logprobs=-1,  # for the KL over the whole vocabulary
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        use_tqdm_on_load=False,
    )
    openings = [" ".join(text.split()[:6]) for text in held_out if text[0].isalpha()]
    params = SamplingParams(temperature=0.4, min_tokens=24, max_tokens=80)
    for output in llm.generate(openings[: args.num_samples], params, use_tqdm=False):
        text = f"[{output.prompt}]{output.outputs[0].text}"
        print(textwrap.fill(text, 88, initial_indent="- ", subsequent_indent="  "))

    # ---- Prove it ----
    prompts = [tokenizer(text)["input_ids"][:24] for text in held_out]
    report = validate(
        llm,
        lambda token_ids: logits_of(model, token_ids),
        prompts[: args.num_prompts],
        max_tokens=args.max_tokens,
    )
    print()
    report.print_table()
    report.write_json(directory / "report.json")
    print(f"The model, its loss curve and this report are in {directory}/")
    return report.exit_code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-seconds", type=float, default=90)
    parser.add_argument("--num-samples", type=int, default=6)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output-dir", type=Path, default=Path("build/demo"))
    sys.exit(main(parser.parse_args()))
