# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plain model with plans and eyes: each 8 x 8 patch of an image becomes a token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from planned_model import CONFIG, HIDDEN, VOCAB, Block
from safetensors.torch import save_file
from torch import nn

from vllm.model_executor.parallel_context import ParallelContext
from vllm.multimodal.modality import Modality

PATCH = 8
IMAGE = 127  # the placeholder, which the tokenizer writes as t127
MAX_PATCHES = 24


def patches(image: Image.Image) -> dict[str, torch.Tensor]:
    """`pixels` `[patches, PATCH * PATCH]`, as many as the image has."""
    gray = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255)
    rows, columns = gray.shape[0] // PATCH, gray.shape[1] // PATCH
    gray = gray[: rows * PATCH, : columns * PATCH]
    cut = gray.reshape(rows, PATCH, columns, PATCH).transpose(1, 2)
    return {"pixels": cut.reshape(rows * columns, PATCH * PATCH)}


def largest() -> Image.Image:
    return Image.new("RGB", (MAX_PATCHES * PATCH, PATCH))


def count(tensors: dict[str, torch.Tensor]) -> int:
    return len(tensors["pixels"])


IMAGES = Modality("image", IMAGE, patches, count, largest)


class ImageModel(nn.Module):
    """`forward` takes token ids, or embeddings with an image's in their places."""

    multimodal = IMAGES
    tp_plan = {
        "embedding": "rowwise",
        "eyes.0": "colwise",
        "eyes.2": "rowwise",
        "layers.*.query_linear": "colwise",
        "layers.*.key_linear": "colwise",
        "layers.*.value_linear": "colwise",
        "layers.*.output_linear": "rowwise",
        "layers.*.up": "colwise",
        "layers.*.down": "rowwise",
        "lm_head": "colwise_rep",
    }
    seen = 0  # images, in this process

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(CONFIG["max_position_embeddings"], HIDDEN)
        self.eyes = nn.Sequential(
            nn.Linear(PATCH * PATCH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)
        )
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def embed_multimodal(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        ImageModel.seen += len(pixels)
        return [self.eyes(of_one) for of_one in pixels]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = inputs_embeds
        if hidden_states is None:
            hidden_states = self.embedding(input_ids)
        hidden_states = hidden_states + self.positions(positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def trained() -> ImageModel:
    """The same weights on every call, so large that an image decides the tokens."""
    generator = torch.Generator().manual_seed(0)
    model = ImageModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def build(vllm_config: object, parallel_context: ParallelContext) -> ImageModel:
    """A factory that other processes import as `image_model:build`."""
    return ImageModel()


def drawing(number: int, rows: int = 2, columns: int = 2) -> Image.Image:
    """An image of noise, the same one for each number."""
    noise = np.random.default_rng(number)
    shape = (rows * PATCH, columns * PATCH, 3)
    return Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))


def log_probs(
    model: ImageModel, token_ids: list[int], images: list[Image.Image]
) -> torch.Tensor:
    """`[tokens, vocab]` of a prompt whose placeholders are repeated already."""
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        embeds = model.embed_input_ids(ids)
        rows = [model.eyes(patches(image)["pixels"]) for image in images]
        if rows:
            embeds[ids == IMAGE] = torch.cat(rows)
        hidden_states = model(None, torch.arange(len(ids)), embeds)
        return model.lm_head(hidden_states).log_softmax(-1)


def save_model(model_dir: Path) -> Path:
    config = CONFIG | {"architectures": ["ImageModel"]}
    (model_dir / "config.json").write_text(json.dumps(config))
    save_file(trained().state_dict(), model_dir / "model.safetensors")
    return model_dir
