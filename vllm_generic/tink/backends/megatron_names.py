# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors and adapters of a Llama-like model: Hugging Face's names and Megatron's.

Megatron computes queries, keys and values by one layer, and a gated MLP's two inputs by
another. An adapter of such a layer has one A, which Hugging Face's layers share, and a
B whose columns are theirs. So files of adapters have Hugging Face's names only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vllm.lora.adapter import Adapter

# Megatron's layer -> those of Hugging Face whose outputs it has
LAYERS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "self_attention.q_layernorm": ("q_norm",),
    "self_attention.k_layernorm": ("k_norm",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
    "input_layernorm": ("input_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
}
OUTSIDE = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
}
HF_PARENTS = {"self_attention": "self_attn.", "mlp": "mlp."}


class Names:
    """Which layers of Hugging Face's are which layer of Megatron's, in one model.

    Args:
        config: Hugging Face's, of a model with queries, keys and values of one width.

    """

    def __init__(self, config: Any) -> None:
        heads = config.num_attention_heads
        groups = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        # A group of heads lies together: its queries, then its key, then its value.
        rows = torch.arange((heads + 2 * groups) * width).view(groups, -1, width)
        queries = heads // groups
        qkv = (rows[:, :queries], rows[:, queries], rows[:, queries + 1])
        gated = torch.arange(2 * config.intermediate_size).view(2, -1)
        self._rows = {
            "linear_qkv": [part.flatten() for part in qkv],
            "linear_fc1": list(gated),
        }
        self.parts: dict[str, tuple[str, ...]] = dict(OUTSIDE)
        for index in range(config.num_hidden_layers):
            for name, parts in LAYERS.items():
                parent = HF_PARENTS.get(name.partition(".")[0], "")
                self.parts[f"decoder.layers.{index}.{name}"] = tuple(
                    f"model.layers.{index}.{parent}{part}" for part in parts
                )

    def rows(self, name: str) -> list[torch.Tensor] | None:
        """Int64 `[outputs of a part]` for each part of `name`; None if it has one."""
        return self._rows.get(name.rpartition(".")[2])

    def tensors(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hugging Face's whole state dict by Megatron's names."""
        found = {}
        for name, parts in self.parts.items():
            for kind in ("weight", "bias"):
                tensors = [weights.get(f"{part}.{kind}") for part in parts]
                whole = [tensor for tensor in tensors if tensor is not None]
                if len(whole) == len(parts):
                    found[f"{name}.{kind}"] = self._joined(name, whole, 0)
        return found

    def to_hf(self, adapter: Adapter) -> Adapter:
        """The adapter that changes Hugging Face's layers by the same."""
        factors = {}
        for name, (a, b) in adapter.factors.items():
            rows = self.rows(name) or [torch.arange(b.shape[1])]
            for part, columns in zip(self.parts[name], rows, strict=True):
                factors[part] = (a.clone(), b[:, columns].contiguous())
        return _renamed(adapter, factors)

    def from_hf(self, adapter: Adapter) -> Adapter:
        """The adapter of Megatron's layers that changes them by the same.

        Raises:
            ValueError: layers that are one in Megatron are not all there, or have not
                one A.

        """
        factors = {}
        left = set(adapter.factors)
        for name, parts in self.parts.items():
            if left.isdisjoint(parts):
                continue
            pairs = [adapter.factors[part] for part in parts if part in left]
            first = pairs[0][0]
            same = all(torch.equal(first, a) for a, _ in pairs[1:])
            if len(pairs) < len(parts) or not same:
                raise ValueError(
                    f"{', '.join(parts)} are one layer of Megatron's, so an adapter "
                    "has to change all of them, with one lora_A. Load it with the "
                    "trainer that made it."
                )
            left.difference_update(parts)
            factors[name] = (first, self._joined(name, [b for _, b in pairs], 1))
        if left:
            raise ValueError(
                f"Megatron's model has no layer {', '.join(sorted(left))}."
            )
        return _renamed(adapter, factors)

    def _joined(
        self, name: str, parts: Iterable[torch.Tensor], axis: int
    ) -> torch.Tensor:
        rows = self.rows(name)
        whole = torch.cat(list(parts), axis)
        if rows is None:
            return whole
        order = torch.cat(rows).argsort().to(whole.device)
        return whole.index_select(axis, order)


def _renamed(adapter: Adapter, factors: dict[str, Any]) -> Adapter:
    config = dataclasses.replace(adapter.config, target_modules=tuple(factors))
    return Adapter(config, factors)
