# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train the plain model of `modeling_plan.py` into a directory that vLLM serves.

    python examples/plan_model/train.py --output-dir build/plan_model
    python -m vllm.entrypoints.link_checkpoint build/plan_model
    vllm serve build/plan_model --trust-remote-code \
        --tensor-parallel-size 2 --pipeline-parallel-size 2

The code of the model has no parallelism; its plans describe it.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from modeling_plan import PlanForCausalLM
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))

from english_corpus import read_paragraphs, train_tokenizer  # noqa: E402

CONFIG = {
    "architectures": ["PlanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_plan.PlanForCausalLM"},
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SEQ, BATCH, LEARNING_RATE = 128, 8, 2e-3


def save_checkpoint(model: PlanForCausalLM, step: int, directory: Path) -> None:
    """Save as trainers do: in a directory that is named by the step."""
    checkpoint = directory / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    state = json.dumps({"global_step": step})
    (checkpoint / "trainer_state.json").write_text(state)


def main(args: argparse.Namespace) -> None:
    directory: Path = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    paragraphs = read_paragraphs()
    tokenizer = train_tokenizer(paragraphs, CONFIG["vocab_size"], directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    tokens = torch.tensor(tokenizer(tokenizer.eos_token.join(paragraphs))["input_ids"])

    model = PlanForCausalLM(SimpleNamespace(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    positions = torch.arange(SEQ)
    start, step, loss = time.monotonic(), 0, torch.tensor(0.0)
    while time.monotonic() - start < args.train_seconds:
        starts = torch.randint(len(tokens) - SEQ, (BATCH,))
        chunks = torch.stack([tokens[s : s + SEQ + 1] for s in starts])
        logits = model.compute_logits(model(chunks[:, :-1], positions))
        loss = F.cross_entropy(logits.flatten(0, 1), chunks[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % args.save_steps == 0:
            save_checkpoint(model, step, directory)
            print(f"step {step}: loss {loss.item():.2f}")
    save_checkpoint(model, step, directory)
    print(f"step {step}: loss {loss.item():.2f}")

    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    shutil.copy(Path(__file__).with_name("modeling_plan.py"), directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("build/plan_model"))
    parser.add_argument("--train-seconds", type=float, default=60)
    parser.add_argument("--save-steps", type=int, default=50)
    main(parser.parse_args())
