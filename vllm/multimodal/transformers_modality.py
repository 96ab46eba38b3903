# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A Modality for the images of a Hugging Face processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .modality import Modality

NUM_TOKENS = "num_image_tokens"
"""Beside the tensors of an image: how many tokens it becomes, int64 `[]`."""

# What a processor makes of the text.
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class _Images:
    """Makes tensors of one image, as a processor does that has a prompt too."""

    processor: Any

    def __call__(self, image: Any) -> dict[str, torch.Tensor]:
        """What the model takes, and `num_image_tokens`, an int64 tensor `[]`.

        Raises:
            ValueError: The image becomes more than one token, repeated.

        """
        token = self.processor.image_token
        made = dict(
            self.processor(
                text=token,
                images=[image],
                return_tensors="pt",
                add_special_tokens=False,
            )
        )
        (ids,) = made["input_ids"].tolist()
        if set(ids) != {self.processor.image_token_id}:
            others = sorted(set(ids) - {self.processor.image_token_id})
            raise ValueError(
                f"{type(self.processor).__name__} makes tokens {others} of an image "
                f"beside its own, {self.processor.image_token_id}; expected that one "
                "token alone is repeated. Write a Modality that does without them."
            )
        tensors = {key: value for key, value in made.items() if key not in OF_TEXT}
        return tensors | {NUM_TOKENS: torch.tensor(len(ids))}


def images_of_processor(
    processor: Any, largest: Callable[[], Any], limit: int | None = None
) -> Modality:
    """Images as a Hugging Face processor makes tensors of them.

    A module with Hugging Face's `get_image_features` gets them as keywords, one image
    at a time.

    Args:
        processor: Of text and images, as `AutoProcessor.from_pretrained` returns it. It
            has to be picklable.
        largest: Makes an image that becomes as many tokens as any can.
        limit: The most images in one prompt; None for any number.

    Raises:
        TypeError: `processor` is none of text and images.

    """
    for name in ("image_processor", "image_token", "image_token_id"):
        if getattr(processor, name, None) is None:
            raise TypeError(
                f"{type(processor).__name__} has no {name}; expected a processor of "
                "text and images, as AutoProcessor.from_pretrained returns it. Write a "
                "Modality for others."
            )
    return Modality(
        "image",
        placeholder=processor.image_token,
        process=_Images(processor),
        num_tokens=_num_tokens,
        largest=largest,
        limit=limit,
    )


def _num_tokens(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many tokens an image becomes of which `_Images` made `tensors`."""
    return int(tensors[NUM_TOKENS])
