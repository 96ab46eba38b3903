# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A Hugging Face model as an engine calls one: many sequences in one axis of tokens.

The service trains this module, and vLLM samples from it (`build`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from vllm.model_executor.layers import TrainableAttention

ATTENTION = "tink"


class PackedModel(nn.Module):
    """Names of parameters and modules are those of the Hugging Face model.

    Args:
        model: a causal language model, whose tensors are shared, and whose attention
            is replaced.

    Raises:
        ValueError: the model has something that this cannot replace.

    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self._base_name = model.base_model_prefix
        head = model.get_output_embeddings()
        names = [name for name, child in model.named_children() if child is head]
        base = getattr(model, self._base_name, None)
        if not names or base is None or base is model:
            raise ValueError(f"{type(model).__name__} has no base model and head.")
        self._head_name = names[0]
        self.add_module(self._base_name, base)
        self.add_module(self._head_name, head)
        _replace_attention(base)
        model.set_attn_implementation(ATTENTION)

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self, self._head_name)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.get_output_embeddings()(hidden_states)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states `[tokens, hidden]` of packed `[tokens]`."""
        outputs = getattr(self, self._base_name)(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False
        )
        return outputs.last_hidden_state[0]


class WholeModel(nn.Module):
    """Any Hugging Face model, called with one sequence, from its first token on.

    Args:
        model: a causal language model, whose modules are shared.

    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        for name, child in model.named_children():
            self.add_module(name, child)
        # no child: its layers have their names in this module already
        self.__dict__["whole"] = model

    def get_output_embeddings(self) -> nn.Module:
        return self.__dict__["whole"].get_output_embeddings()

    def compute_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, vocab]`, with what the model does after its head."""
        whole = self.__dict__["whole"]
        return whole(input_ids=input_ids[None], use_cache=False).logits[0]


def copy_sharing_parameters(model: nn.Module) -> Any:
    """Another module of the same parameters, which has its own hooks and config."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def pack(model: Any) -> PackedModel:
    """A packed model with the tensors of `model`, checked against it.

    Raises:
        ValueError: its attention cannot be replaced, or it computes something else.

    """
    packed = PackedModel(copy_sharing_parameters(model)).eval()
    check_logits(model, packed, "its sequences are packed")
    return packed


def check_logits(model: Any, module: Any, how: str) -> None:
    """Compare a module that is called with packed sequences with a Hugging Face model.

    Args:
        model: the Hugging Face model.
        module: has `compute_logits` too.
        how: when the logits are those of `module`, for the error.

    Raises:
        ValueError: it computes other logits.

    """
    tokens = torch.arange(8, device=model.device) % model.config.vocab_size
    positions = torch.arange(8, device=model.device)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0]
        found = module.compute_logits(module(tokens, positions))
    error = (found - expected).float().norm() / expected.float().norm()
    limit = 1e-4 if expected.dtype == torch.float32 else 0.05
    if not error < limit:
        raise ValueError(
            f"{type(model).__name__} computes other logits when {how}: they differ "
            f"by {float(error):.2g} of their norm, expected at most {limit}."
        )


def build(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """The callable that the service registers with vLLM."""
    model = AutoModelForCausalLM.from_config(vllm_config.model_config.hf_config)
    return PackedModel(model)


def register(folder: Path, factory: str = f"{__name__}:build") -> None:
    """Let vLLM serve the model of a directory by `factory`, in all its processes."""
    from transformers import AutoConfig

    from vllm import ModelRegistry

    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    ModelRegistry.register_model(architecture, factory, supports_torch_compile=False)


# ---- Attention -----------------------------------------------------------------------


def _replace_attention(base: nn.Module) -> None:
    """Give each attention layer one that trains and serves."""
    layers = [
        module
        for module in base.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
    ]
    if not layers:
        raise ValueError(
            f"{type(base).__name__} has no attention layer that Hugging Face's "
            "attention interface calls."
        )
    for layer in layers:
        _add_served(layer)


def _add_served(layer: Any) -> None:
    if not getattr(layer, "is_causal", True) or hasattr(layer, "sinks"):
        raise ValueError(f"{type(layer).__name__} is not causal, or has sinks.")
    heads = layer.config.num_attention_heads
    layer.served = TrainableAttention(
        heads,
        layer.head_dim,
        heads // layer.num_key_value_groups,
        scale=layer.scaling,
        sliding_window=getattr(layer, "sliding_window", None),
        logits_soft_cap=getattr(layer, "attn_logit_softcapping", None),
    )


def _attend(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's interface: `[batch, heads, seq, head_dim]` in, heads third out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return layer.served(q, k, v), None


AttentionInterface.register(ATTENTION, _attend)
