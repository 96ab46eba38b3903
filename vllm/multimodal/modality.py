# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a user says of the inputs, beside text, that a registered model takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

NAMES = ("image", "audio", "video")
"""What requests can bring, by vLLM's names."""


@dataclass(frozen=True)
class Modality:
    """One kind of input, for `register_model(..., multimodal=...)`.

    Functions have to be picklable by cloudpickle, as factories are. `process` runs in
    the process that takes requests, and the module's `embed_multimodal(**tensors)` in
    the workers.

    Args:
        name: "image", "audio" or "video".
        placeholder: The token that stands for one input in a prompt, as text or as an
            id. vLLM repeats it, once for each row that `embed_multimodal` returns.
        process: Makes tensors, by the names that `embed_multimodal` takes, of one
            input: a PIL image in RGB, an array `[samples]`, or an array
            `[frames, height, width, 3]`. They may depend on this input alone.
            Floating-point ones are cast to the model's dtype.
        num_tokens: How many placeholders an input becomes: a number, or a function of
            the tensors of that input.
        largest: Makes an input that becomes as many placeholders as any can. With it
            vLLM reserves memory, and tries the module when an engine starts.
        limit: The most inputs of this kind in one prompt; None for any number.
        sampling_rate: To which vLLM resamples audio, in Hz; None to take it as it is.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument has another value.

    Example: `Modality("image", placeholder="<image>", process=patches, num_tokens=16,
    largest=lambda: Image.new("RGB", (28, 28)))`

    """

    name: str
    placeholder: str | int
    process: Callable[[Any], Mapping[str, torch.Tensor]]
    num_tokens: int | Callable[[Mapping[str, torch.Tensor]], int]
    largest: Callable[[], Any]
    limit: int | None = None
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(
                f"a Modality's name is {self.name!r}; expected one of "
                f"{', '.join(NAMES)}, as requests name what they bring."
            )
        if not isinstance(self.placeholder, str | int) or self.placeholder == "":
            raise TypeError(
                f"the placeholder of {self.name} is {self.placeholder!r}; expected a "
                "token of the tokenizer, as text or as an id."
            )
        for argument in ("process", "largest"):
            if not callable(getattr(self, argument)):
                raise TypeError(
                    f"{argument} of {self.name} is {getattr(self, argument)!r}; "
                    "expected a function."
                )
        if not isinstance(self.num_tokens, int) and not callable(self.num_tokens):
            raise TypeError(
                f"num_tokens of {self.name} is {self.num_tokens!r}; expected an int or "
                "a function of the tensors."
            )
        for argument in ("num_tokens", "limit"):
            number = getattr(self, argument)
            if isinstance(number, int) and number < 1:
                raise ValueError(
                    f"{argument} of {self.name} is {number}; expected at least 1."
                )

    def tensors(self, item: Any) -> dict[str, torch.Tensor]:
        """What `process` makes of one input.

        Raises:
            TypeError: It is no mapping of names to tensors.

        """
        made = self.process(item)
        if not isinstance(made, Mapping) or not made:
            raise TypeError(
                f"process of {self.name} returned a {type(made).__name__}; expected a "
                "dict of tensors by the names that embed_multimodal takes."
            )
        for name, tensor in made.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"process of {self.name} returned a {type(tensor).__name__} as "
                    f"{name!r}; expected a tensor. torch.from_numpy makes one of an "
                    "array."
                )
        return dict(made)

    def count(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """How many placeholders an input with these `tensors` becomes.

        Raises:
            ValueError: `num_tokens` returned no number, or one below 1.

        """
        if isinstance(self.num_tokens, int):
            return self.num_tokens
        count = self.num_tokens(tensors)
        if not isinstance(count, int) or count < 1:
            raise ValueError(
                f"num_tokens of {self.name} returned {count!r}; expected an int of at "
                "least 1."
            )
        return count
