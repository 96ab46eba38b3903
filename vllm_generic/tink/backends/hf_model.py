# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A frozen Hugging Face model, and PEFT adapters in it."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_generic.tink.backends.base import LoraSpec

ATTENTION_NAMES = ("attn", "attention")


def load_base(folder: Path, device: str) -> Any:
    """The causal language model of a directory, frozen, in evaluation mode.

    On a CPU it computes in float32, elsewhere in the dtype of its config.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else "auto"
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def copy_sharing_parameters(model: nn.Module) -> Any:
    """Another module of the same parameters, which can hold other adapters."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def max_length(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def linear_layers(model: Any) -> dict[str, str]:
    """Name -> "attn", "mlp" or "unembed", of each linear layer of a plain model.

    The head is the model's output embedding. Layers of attention are those with
    "attn" or "attention" in their name; every other layer counts as MLP.
    """
    head = model.get_output_embeddings()
    kinds = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is head:
            kinds[name] = "unembed"
        elif any(part in name for part in ATTENTION_NAMES):
            kinds[name] = "attn"
        else:
            kinds[name] = "mlp"
    return kinds


def target_modules(layers: dict[str, str], spec: LoraSpec) -> list[str]:
    """The layers that the spec's train_attn, train_mlp and train_unembed mean."""
    wanted = {
        "attn": spec.train_attn,
        "mlp": spec.train_mlp,
        "unembed": spec.train_unembed,
    }
    return [name for name, kind in layers.items() if wanted[kind]]


def forward_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [N, vocabulary] of one sequence [N].

    Trainer and sampler both score one whole sequence at a time. So a sequence has the
    same bits in both, and whatever else is in a batch.
    """
    return model(input_ids=tokens[None], use_cache=False).logits[0]
