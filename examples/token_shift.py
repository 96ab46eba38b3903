# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A state of your own beside attention: trained on a CPU in seconds, then served.

    python examples/token_shift.py [--steps 400]

Each token of a sequence is the sum of the two before it, modulo 31. A token shift shows
each position the token before. An engine keeps that token for each request: here it
reads prompts in chunks of 16 tokens, and has room for some of the requests only, so
that others are preempted and read again.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sums import VOCAB, sequences, train
from torch import nn

from vllm import LLM, ModelRegistry
from vllm.model_executor.layers import TrainableFlashAttention
from vllm.model_executor.layers.previous_tokens import PreviousTokens
from vllm.model_validation import validate

HIDDEN, HEADS, LENGTH = 64, 2, 128


class Model(nn.Module):
    """`[batch, seq]` or `[tokens]` ids -> hidden states `[..., hidden]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.shift = PreviousTokens(HIDDEN)
        self.mix = nn.Linear(2 * HIDDEN, HIDDEN)
        self.attention = TrainableFlashAttention(HIDDEN, HEADS, rope_theta=10000.0)
        self.expand = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.contract = nn.Linear(4 * HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        x = self.mix(torch.cat([x, self.shift(x)[..., 0, :]], dim=-1))
        x = x + 0.1 * self.attention(x, positions)
        return self.norm(x + self.contract(F.gelu(self.expand(x))))


def trained(steps: int) -> Model:
    torch.manual_seed(0)
    model = Model()
    positions = torch.arange(15).expand(64, -1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(model(rows[:, :-1], positions))  # [64, 15, vocab]
        # Nothing can be known of the second token.
        return F.cross_entropy(logits[:, 1:].flatten(0, 1), rows[:, 2:].flatten())

    train("model", model, loss_of, steps, count=64, length=16)
    return model


def serve(model: Model, folder: Path) -> dict[str, Any]:
    """What the engine answers, beside the trained module."""
    config = {
        "architectures": ["TokenShift"],
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    ModelRegistry.register_model("TokenShift", lambda vllm_config, context: Model())
    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=LENGTH,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,
        block_size=32,
        max_num_batched_tokens=16,
        max_num_seqs=5,
        num_gpu_blocks_override=14,
    )
    prompts = sequences(8, 60, torch.Generator().manual_seed(1)).tolist()

    def reference(ids: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model(ids, torch.arange(len(ids))))

    report = validate(llm, reference, prompts, max_tokens=24)
    metrics = {
        metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()
    }
    return {
        "agrees": report.exit_code == 0,
        "max_logprob_diff": max(token.logprob_diff for token in report.tokens),
        "preemptions": metrics["vllm:num_preemptions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    model = trained(args.steps)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        print(json.dumps(serve(model, Path(folder))))


if __name__ == "__main__":
    main()
