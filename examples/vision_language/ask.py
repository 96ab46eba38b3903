# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ask a server of `train.py`'s model about an image that is drawn here.

    python examples/vision_language/ask.py --url http://localhost:8000

The image goes as base64 in a request of OpenAI's API.
"""

import argparse
import base64
import io
import random

import requests
from drawings import QUESTIONS, draw


def main(args: argparse.Namespace) -> None:
    model = requests.get(f"{args.url}/v1/models", timeout=60).json()["data"][0]["id"]
    pen = random.Random(args.seed)
    drawing = draw(pen)
    png = io.BytesIO()
    drawing.image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    print(f"an image of {drawing.count} {drawing.color} {drawing.shape}")
    for question in QUESTIONS:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ]
        answer = requests.post(
            f"{args.url}/v1/chat/completions",
            json={
                "model": model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": 4,
            },
            timeout=120,
        )
        answer.raise_for_status()
        said = answer.json()["choices"][0]["message"]["content"]
        print(f"{question} {said.strip()} (it is {drawing.answer(question)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--seed", type=int, default=2)
    main(parser.parse_args())
