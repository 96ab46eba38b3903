# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small vision-language model: an encoder of images, and a GPT that reads both.

This file is in the directory of `config.json`, whose `auto_map` names the class. The
class says by `multimodal` which inputs it takes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vllm.model_executor.layers import TrainableFlashAttention
from vllm.multimodal.modality import Modality

SIDE = 32  # of an image, in pixels
PATCH = 8
PATCHES = (SIDE // PATCH) ** 2
IMAGE = "<image>"


def process(image: Image.Image) -> dict[str, torch.Tensor]:
    """`pixels` `[SIDE, SIDE, 3]` from -1 to 1; runs where requests arrive."""
    small = image.convert("RGB").resize((SIDE, SIDE))
    return {"pixels": torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1)}


class Encoder(nn.Module):
    """Images `[images, SIDE, SIDE, 3]` -> embeddings `[images, PATCHES, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, PATCH // 2, stride=PATCH // 2),
        )
        self.place = nn.Parameter(torch.randn(PATCHES, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch(pixels.permute(0, 3, 1, 2)).flatten(2).mT + self.place
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        # [3, images, heads, PATCHES, head_dim]; every patch sees all of its image
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        return x + self.mlp(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = TrainableFlashAttention(width, heads, rope_theta=1e4)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x), positions)
        return x + self.mlp(x)


class ShapesForConditionalGeneration(nn.Module):
    """Answers questions about images of coloured shapes."""

    multimodal = Modality(
        "image",
        placeholder=IMAGE,
        process=process,
        num_tokens=PATCHES,
        largest=lambda: Image.new("RGB", (SIDE, SIDE)),
    )

    def __init__(self, config) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.encoder = Encoder(width, heads)
        self.blocks = nn.ModuleList(
            Block(width, heads) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def embed_multimodal(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[images, SIDE, SIDE, 3]` -> `[images, PATCHES, hidden]`."""
        return self.encoder(pixels)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, `[batch, seq, hidden]` in training and `[tokens, hidden]`."""
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)
