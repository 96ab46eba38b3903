# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Positions of several axes (M-RoPE), as a module's own code computes them.

References: https://arxiv.org/abs/2409.12191; Transformers' `get_rope_index`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

# What Transformers' models call the kinds of tokens; a token of text is 0.
TYPE_OF_MODALITY = {"image": 1, "video": 2}

# The argument of `get_rope_index` with the type of each token.
TYPES = "mm_token_type_ids"


class PositionsOfSeveralAxes:
    """vLLM's `SupportsMRoPE`, for a wrapper whose `module` computes such positions."""

    module: Any  # a torch.nn.Module
    supports_mrope: bool = False

    def get_mrope_input_positions(
        self,
        input_tokens: list[int],
        mm_features: Sequence[MultiModalFeatureSpec],
    ) -> tuple[torch.Tensor, int]:
        """Positions `[axes, tokens]` of a prompt, int64.

        Also what has to be added to the index of a later token to get its position,
        which is the same on all axes.
        """
        own: Any = getattr(self.module, "get_mrope_input_positions", None)
        if own is not None:
            return own(input_tokens, mm_features)
        rope_index = find_rope_index(self.module)
        assert rope_index is not None  # or check_positions has refused the module
        inputs = [
            Input(
                feature.modality,
                feature.mm_position.offset,
                feature.mm_position.length,
                feature.data.get_data() if feature.data else {},
            )
            for feature in mm_features
        ]
        return _positions(rope_index, input_tokens, inputs)

    def try_positions(
        self, modality: str, tokens: int, tensors: Mapping[str, Any]
    ) -> None:
        """Ask for the positions of one input, as a request will.

        Args:
            modality: Its name.
            tokens: How many placeholders it becomes.
            tensors: As `Modality.process` made them.

        Raises:
            ValueError: `get_rope_index` of Transformers' form does not give them.

        """
        rope_index = find_rope_index(self.module)
        if rope_index is None or hasattr(self.module, "get_mrope_input_positions"):
            return
        one = Input(modality, 0, tokens, tensors)
        try:
            _positions(rope_index, [0] * tokens, [one])
        except Exception as error:
            shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
            raise ValueError(
                f"get_rope_index of {type(self.module).__name__} has no positions for "
                f"{tokens} tokens of one {modality}, of which process made {shapes}: "
                f"{error}. Make of each {modality} what the module's own processor "
                "does; Qwen3-VL's makes an input of its own of every two frames."
            ) from error


@dataclass(frozen=True)
class Input:
    """Where an input is in a prompt, and the tensors that were made of it."""

    modality: str
    offset: int
    length: int
    tensors: Mapping[str, Any]


def find_rope_index(module: nn.Module) -> Callable[..., Any] | None:
    """The `get_rope_index` of Transformers' form that `module` or a part of it has."""
    for part in module.modules():
        method = getattr(part, "get_rope_index", None)
        if callable(method) and TYPES in inspect.signature(method).parameters:
            return method
    return None


def check_types(
    architecture: str, module: nn.Module, modalities: Sequence[str]
) -> None:
    """Check that `get_rope_index` knows all kinds of inputs, if it is asked.

    Raises:
        ValueError: it does not.

    """
    unknown = [name for name in modalities if name not in TYPE_OF_MODALITY]
    if unknown and not hasattr(module, "get_mrope_input_positions"):
        raise ValueError(
            f"{architecture}: get_rope_index of {type(module).__name__} is asked for "
            f"positions of {', '.join(unknown)}; expected image or video. Give the "
            "module vLLM's get_mrope_input_positions, which knows the others."
        )


def _positions(
    rope_index: Callable[..., Any],
    input_tokens: list[int],
    inputs: Sequence[Input],
) -> tuple[torch.Tensor, int]:
    types = torch.zeros(len(input_tokens), dtype=torch.int32)
    # Beside the types, a module may want sizes of the inputs, by the names of the
    # tensors that its processor made.
    wanted = inspect.signature(rope_index).parameters.keys() - {"input_ids", TYPES}
    sizes: dict[str, list[torch.Tensor]] = {}
    for one in sorted(inputs, key=lambda one: one.offset):
        types[one.offset : one.offset + one.length] = TYPE_OF_MODALITY[one.modality]
        for name, value in one.tensors.items():
            if name in wanted and isinstance(value, torch.Tensor):
                sizes.setdefault(name, []).append(value.cpu())
    positions, delta = rope_index(
        torch.tensor([input_tokens]),
        types[None],
        **{name: torch.cat(values) for name, values in sizes.items()},
    )
    return positions[:, 0].long(), int(delta)  # [axes, 1, tokens] -> [axes, tokens]
