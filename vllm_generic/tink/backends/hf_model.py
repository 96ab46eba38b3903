# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A frozen Hugging Face model, and which of its layers an adapter changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm.lora.sites import Site
from vllm_generic.tink.backends.base import LoraSpec
from vllm_generic.tink.errors import UserError

ATTENTION_NAMES = ("attn", "attention")


def load_base(folder: Path, device: str) -> Any:
    """The causal language model of a directory, frozen, in evaluation mode.

    On a CPU it computes in float32, elsewhere in the dtype of its config.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else "auto"
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def max_length(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def kinds_of_layers(
    sites: Mapping[str, Site], head: nn.Module, stacks: bool = False
) -> dict[str, str]:
    """Name -> "attn", "mlp" or "unembed", of each linear layer.

    Layers of attention are those with "attn" or "attention" in their name; every other
    layer but the head counts as MLP.

    Args:
        sites: Of the model.
        head: The model's.
        stacks: Also parameters that stack the weights of a block's experts, as MLP.

    """
    kinds = {}
    for name, site in sites.items():
        if site.module is head:
            kinds[name] = "unembed"
        elif not site.is_embedding and (stacks or not site.experts):
            attention = any(part in name for part in ATTENTION_NAMES)
            kinds[name] = "attn" if attention else "mlp"
    return kinds


def target_modules(kinds: Mapping[str, str], spec: LoraSpec) -> list[str]:
    """The layers that the spec's train_attn, train_mlp and train_unembed mean.

    Raises:
        UserError: there are none.

    """
    wanted = {
        "attn": spec.train_attn,
        "mlp": spec.train_mlp,
        "unembed": spec.train_unembed,
    }
    names = [name for name, kind in kinds.items() if wanted[kind]]
    if not names:
        raise UserError(
            "the adapter has no layer: train_attn, train_mlp and train_unembed are "
            "all false, or the model has no such linear layer"
        )
    return names
