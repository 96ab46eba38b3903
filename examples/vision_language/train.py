# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train a small vision-language model on drawn shapes, and ask it about images.

    python examples/vision_language/train.py --output-dir build/shapes
    vllm serve build/shapes --trust-remote-code
    python examples/vision_language/ask.py --url http://localhost:8000

It trains for 90 seconds on images that it draws. Then vLLM answers questions about new
images by `LLM.chat`, and each answer's log-probabilities are compared with those of the
module by itself: the exit code is not 0 if any differ by more than 1e-4.
"""
# ruff: noqa: E402

import argparse
import json
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that it starts sooner
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this process also trains

import torch
import torch.nn.functional as F
from drawings import (
    IMAGE_ID,
    QUESTION_OF_TWO,
    QUESTIONS,
    Drawing,
    draw,
    make_tokenizer,
)
from modeling_shapes import IMAGE, PATCHES, ShapesForConditionalGeneration, process
from safetensors.torch import save_file

from vllm import LLM, SamplingParams

CONFIG = {
    "architectures": ["ShapesForConditionalGeneration"],
    "auto_map": {
        "AutoModelForCausalLM": "modeling_shapes.ShapesForConditionalGeneration"
    },
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
BATCH, LEARNING_RATE, WARMUP_STEPS = 64, 2e-3, 50
TOLERANCE = 1e-4


@dataclass
class Chat:
    """Questions about some drawings, and their answers."""

    drawings: list[Drawing]
    questions: list[str]
    answers: list[str]


def chats(pen: random.Random, count: int) -> list[Chat]:
    """All of one drawing with each question, or all of two with one."""
    if pen.random() < 0.6:
        drawings = [draw(pen) for _ in range(count)]
        asked = [pen.sample(QUESTIONS, len(QUESTIONS)) for _ in drawings]
        return [
            Chat([drawing], questions, [drawing.answer(one) for one in questions])
            for drawing, questions in zip(drawings, asked, strict=True)
        ]
    pairs = []
    for _ in range(count):
        first, second = draw(pen), draw(pen)
        same = pen.random() < 0.5
        while (first.color == second.color) != same:
            second = draw(pen)
        pairs.append(
            Chat([first, second], [QUESTION_OF_TWO], ["yes" if same else "no"])
        )
    return pairs


def messages(chat: Chat, answered: int) -> list[dict]:
    """As `LLM.chat` takes it: `answered` questions with their answers, and one more."""
    parts = [{"type": "image_pil", "image_pil": d.image} for d in chat.drawings]
    content: Any = [*parts, {"type": "text", "text": chat.questions[0]}]
    turns = [{"role": "user", "content": content}]
    for index in range(answered):
        turns.append({"role": "assistant", "content": chat.answers[index]})
        if index + 1 < len(chat.questions):
            turns.append({"role": "user", "content": chat.questions[index + 1]})
    return turns


def tokens_of(tokenizer, chat: Chat) -> list[int]:
    """The whole chat, with as many placeholders as vLLM makes of each image."""
    text = tokenizer.apply_chat_template(
        messages(chat, len(chat.answers)), tokenize=False
    )
    return tokenizer.encode(text.replace(IMAGE, " ".join([IMAGE] * PATCHES)))


def logits_of(
    model: ShapesForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    """`[batch, seq, vocab]` of `ids` `[batch, seq]` and of their images' `pixels`."""
    embeddings = model.embed_input_ids(ids)
    rows = model.embed_multimodal(pixels).flatten(0, 1)  # [images * PATCHES, hidden]
    places = ids == IMAGE_ID
    # An answer may have the token too, where it is a token like others.
    places &= places.cumsum(1) <= len(rows) // len(ids)
    embeddings = embeddings.masked_scatter(places[..., None], rows)
    return model.lm_head(model(None, torch.arange(ids.shape[1]), embeddings))


def pixels_of(drawings: list[Drawing]) -> torch.Tensor:
    return torch.stack([process(drawing.image)["pixels"] for drawing in drawings])


def train(tokenizer, seconds: float) -> ShapesForConditionalGeneration:
    pen = random.Random(0)
    config = SimpleNamespace(**CONFIG, vocab_size=len(tokenizer))
    model = ShapesForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    assistant = tokenizer.convert_tokens_to_ids("<assistant>")
    start, step = time.monotonic(), 0
    while (passed := time.monotonic() - start) < seconds or step < 2:
        left = max(1 - passed / seconds, 0.0)
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS, 2 * left + 0.02)
        optimizer.param_groups[0]["lr"] = rate
        batch = chats(pen, BATCH)
        ids = torch.tensor([tokens_of(tokenizer, chat) for chat in batch])
        pixels = pixels_of([one for chat in batch for one in chat.drawings])
        # Learn the token after <assistant>, and the one after that.
        learned = ids[:, :-1] == assistant
        learned[:, 1:] |= learned[:, :-1].clone()
        logits = logits_of(model, ids[:, :-1], pixels)[learned]
        loss = F.cross_entropy(logits, ids[:, 1:][learned])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
        step += 1
    print(f"step {step}: loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def difference(model, output, drawings: list[Drawing]) -> float:
    """The largest one between served log-probabilities and the module's own."""
    prompt, answer = list(output.prompt_token_ids), output.outputs[0]
    ids = torch.tensor([prompt + list(answer.token_ids)])
    own = logits_of(model, ids, pixels_of(drawings))[0].log_softmax(-1)
    own = own[len(prompt) - 1 : -1]
    steps = zip(answer.logprobs, answer.token_ids, strict=True)
    served = [step[token].logprob for step, token in steps]
    expected = own.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    return float((torch.tensor(served) - expected).abs().max())


def main(args: argparse.Namespace) -> int:
    directory: Path = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    model = train(tokenizer, args.train_seconds)
    save_file(model.state_dict(), directory / "model.safetensors")
    config = CONFIG | {"vocab_size": len(tokenizer)}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(Path(__file__).with_name("modeling_shapes.py"), directory)

    pen = random.Random(1)
    asked = [chat for _ in range(args.num_prompts) for chat in chats(pen, 1)]
    llm = LLM(
        str(directory),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=128,
        kv_cache_memory_bytes=1 << 26,
        enforce_eager=True,
    )
    outputs = llm.chat(
        [messages(chat, answered=0) for chat in asked],
        SamplingParams(temperature=0, max_tokens=4, logprobs=1),
        use_tqdm=False,
    )
    right, worst = 0, 0.0
    for chat, output in zip(asked, outputs, strict=True):
        said = output.outputs[0].text.strip()
        right += said == chat.answers[0]
        worst = max(worst, difference(model, output, chat.drawings))
        things = ", ".join(f"{d.count} {d.color} {d.shape}" for d in chat.drawings)
        print(f"[{things}] {chat.questions[0]} {said}")
    print(f"{right} of {len(asked)} answers are right")
    passed = worst <= TOLERANCE
    print(
        f"largest difference of log-probabilities {worst:.1e}: "
        f"{'PASSED' if passed else 'FAILED'}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("build/shapes"))
    parser.add_argument("--train-seconds", type=float, default=90)
    parser.add_argument("--num-prompts", type=int, default=40)
    sys.exit(main(parser.parse_args()))
