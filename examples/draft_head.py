# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A draft head of your own, in EAGLE's form: trained, then it speeds up its target.

    python examples/draft_head.py [--steps 300] [--head-steps 300]

The target is Transformers' Llama, registered by one line. It learns sequences in which
each token is the sum of the two before it, modulo 31. The head gets the target's hidden
state of each token, and the token that came next, and learns what the target says then.
An engine with the head answers what one without it does, with fewer steps.
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
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.layers import TrainableFlashAttention

HIDDEN, HEADS, LENGTH = 64, 2, 128
BATCH, TRAINED_LENGTH = 32, 80
DRAFTED = 3  # tokens in a step of the target
TARGET = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=4 * HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    max_position_embeddings=LENGTH,
    dtype="float32",
)


class Head(nn.Module):
    """Drafts from a target's hidden states.

    `forward` gets the token that came next in the place of each token, and returns
    hidden states for `lm_head`, which it is also given in its own next step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.mix = nn.Linear(2 * HIDDEN, HIDDEN)
        self.attention = TrainableFlashAttention(HIDDEN, HEADS, rope_theta=10000.0)
        self.expand = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.contract = nn.Linear(4 * HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        x = self.mix(torch.cat([self.embedding(input_ids), hidden_states], dim=-1))
        x = x + self.attention(x, positions)
        return x + self.contract(F.gelu(self.expand(x)))


def train_target(steps: int) -> Any:
    model = AutoModelForCausalLM.from_config(TARGET)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = model(rows[:, :-1]).logits  # [batch, length - 1, vocab]
        # Nothing can be known of the second token.
        return F.cross_entropy(logits[:, 1:].flatten(0, 1), rows[:, 2:].flatten())

    train("target", model, loss_of, steps, BATCH, TRAINED_LENGTH)
    return model


def train_head(target: Any, steps: int) -> Head:
    """It learns the target's distributions, and hidden states to go on from."""
    head = Head()
    positions = torch.arange(TRAINED_LENGTH - 2).expand(BATCH, -1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states = target.model(rows).last_hidden_state  # [batch, length, hidden]
            wanted = target.lm_head(states[:, 1:-1]).softmax(-1)
        drafted = head(rows[:, 1:-1], positions, states[:, :-2])
        # What it returns takes the place of the target's in its next step.
        again = head(rows[:, 2:-1], positions[:, 1:], drafted[:, :-1])
        return F.cross_entropy(
            head.lm_head(drafted).flatten(0, 1), wanted.flatten(0, 1)
        ) + F.cross_entropy(
            head.lm_head(again).flatten(0, 1), wanted[:, 1:].flatten(0, 1)
        )

    train("head", head, loss_of, steps, BATCH, TRAINED_LENGTH, seed=1)
    return head


def save_head(head: Head, folder: Path) -> None:
    folder.mkdir()
    config = {
        # vLLM puts "Eagle" before a name that does not begin with it.
        "architectures": ["EagleSums"],
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(head.state_dict(), folder / "model.safetensors")


def answers(folder: Path, head: Path | None) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy tokens, and what was counted."""
    speculation: dict[str, Any] | None = None
    if head is not None:
        speculation = {"method": "eagle", "model": str(head)}
        speculation["num_speculative_tokens"] = DRAFTED
    llm = LLM(
        str(folder),
        max_model_len=LENGTH,
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,
        max_num_batched_tokens=32,  # prompts are read in chunks
        max_num_seqs=4,
        speculative_config=speculation,
    )
    rows = sequences(8, 40, torch.Generator().manual_seed(2)).tolist()
    params = SamplingParams(temperature=0, max_tokens=40)
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in rows], params, use_tqdm=False
    )
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return [list(output.outputs[0].token_ids) for output in outputs], counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--head-steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    target = train_target(args.steps)
    head = train_head(target, args.head_steps)
    ModelRegistry.register_model(
        "LlamaForCausalLM",
        lambda config, context: AutoModelForCausalLM.from_config(
            config.model_config.hf_config
        ),
    )
    ModelRegistry.register_model("EagleSums", lambda config, context: Head())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target.save_pretrained(folder / "target")
        save_head(head, folder / "head")
        alone, _ = answers(folder / "target", None)
        found, counted = answers(folder / "target", folder / "head")
    kind = "vllm:spec_decode_num"
    drafted, accepted = (
        counted[f"{kind}_{name}_tokens"] for name in ("draft", "accepted")
    )
    result = {
        "equal": found == alone,
        "drafted": drafted,
        "accepted": round(accepted / drafted, 3),
        "tokens_in_a_step": round(1 + accepted / counted[f"{kind}_drafts"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
