# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Features of an image that decoder layers add to what they return.

Transformers gives them to the text model beside the embeddings. An engine's step has
embeddings alone, of several requests and perhaps of a part of an image. So the features
wait where the step's tokens are, and hooks add them.

Reference: DeepStack, https://arxiv.org/abs/2406.04334
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.utils.torch_utils import direct_register_custom_op

# What Transformers calls the argument of a text model, and in the config the layers of
# the encoder that make them.
FEATURES, LEVELS = "deepstack_visual_embeds", "deepstack_visual_indexes"


class LayerFeatures:
    """What the tokens of a step add to the output of the first decoder layers.

    Args:
        layers: The decoder layers that add something; they get hooks.
        tokens: The most of a step.
        like: An empty tensor `[hidden]`, for dtype and device.

    """

    def __init__(
        self, layers: Sequence[nn.Module], tokens: int, like: torch.Tensor
    ) -> None:
        self.levels = len(layers)
        self._width = len(like)
        self._rows = like.new_zeros((self.levels, tokens, self._width))
        for rows, layer in zip(self._rows, layers, strict=True):
            layer.register_forward_hook(partial(_add, rows))

    def keep(
        self,
        tokens: int,
        embeddings: Sequence[torch.Tensor],
        is_multimodal: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Keep what a step's inputs add, and return what is to be merged.

        Args:
            tokens: Of the step.
            embeddings: `[tokens of an input, hidden]`, or as `beside` made them.
            is_multimodal: Bool `[tokens]`, those that `embeddings` are of.

        Returns:
            `[tokens of an input, hidden]` of each.

        """
        self._rows[:, :tokens] = 0
        merged = [each[:, : self._width] for each in embeddings]
        if is_multimodal is None or not merged:
            return merged
        # [tokens of all inputs, levels, hidden]
        features = self._rows.new_zeros(
            (sum(map(len, merged)), self.levels, self._width)
        )
        start = 0
        for each in embeddings:
            if each.shape[1] > self._width:  # others, such as sounds, add nothing
                added = each[:, self._width :].unflatten(1, (self.levels, -1))
                features[start : start + len(each)] = added
            start += len(each)
        mask = is_multimodal.to(self._rows.device)[:, None]
        for level, rows in enumerate(self._rows):
            rows[:tokens].masked_scatter_(mask, features[:, level].contiguous())
        return merged


def layer_features(
    architecture: str, module: nn.Module, vllm_config: VllmConfig
) -> LayerFeatures | None:
    """For a module of Transformers whose decoder layers add features of images.

    Raises:
        ValueError: Its layers are divided into pipeline stages.

    """
    config = getattr(module, "config", None)
    levels = len(getattr(getattr(config, "vision_config", None), LEVELS, ()))
    layers = _decoder_layers(module)[:levels]
    if not layers:
        return None
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"{architecture}: the first {levels} decoder layers of "
            f"{type(module).__name__} add features of images, which only the first "
            "pipeline stage has. Start it with pipeline_parallel_size=1."
        )
    model_config = vllm_config.model_config
    like = torch.empty(
        model_config.get_inputs_embeds_size(),
        dtype=model_config.dtype,  # type: ignore[arg-type]
        device=vllm_config.device_config.device,
    )
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    return LayerFeatures(layers, tokens, like)


def beside(embeddings: torch.Tensor, features: Any, levels: int) -> torch.Tensor:
    """One tensor of an input's embeddings and of what decoder layers add.

    Args:
        embeddings: `[tokens, hidden]`.
        features: Of each level `[tokens, hidden]`, or a list of one such tensor.
        levels: How many decoder layers add something.

    Returns:
        `[tokens, (1 + levels) x hidden]`.

    Raises:
        TypeError: Other features were found.

    """
    found = [
        one[0] if isinstance(one, list | tuple) and len(one) == 1 else one
        for one in features
    ]
    if len(found) != levels or any(
        not isinstance(one, torch.Tensor) or one.shape != embeddings.shape
        for one in found
    ):
        raise TypeError(
            f"it returned deepstack_features of {len(found)} layers; expected as many "
            f"tensors {list(embeddings.shape)} as decoder layers add them: {levels}, "
            f"by {FEATURES} of the text model and {LEVELS} of the vision config. "
            "Serve vLLM's own model of this architecture, without registering it."
        )
    return torch.cat([embeddings, *found], dim=1)


def _decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Those of the part that takes features for its layers; the i-th adds the i-th."""
    for part in module.modules():
        layers = getattr(part, "layers", None)
        takes = inspect.signature(part.forward).parameters
        if isinstance(layers, nn.ModuleList) and FEATURES in takes:
            return list(layers)
    return []


def _add(rows: torch.Tensor, layer: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.ops.vllm.add_layer_features(output[0], rows), *output[1:])
    return torch.ops.vllm.add_layer_features(output, rows)


def add_layer_features(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`hidden` `[..., tokens, width]` and the first of `rows` `[most tokens, width]`.

    It is an operator, so that a graph of a step asks nothing about its length.
    """
    out = hidden.clone()
    tokens = min(hidden.shape[-2], rows.shape[0])
    out[..., :tokens, :] += rows[:tokens]
    return out


def _fake(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden)


direct_register_custom_op("add_layer_features", add_layer_features, fake_impl=_fake)
