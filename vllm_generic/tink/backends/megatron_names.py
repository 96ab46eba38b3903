# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors and adapters of a Llama-like model: Hugging Face's names and Megatron's.

Megatron computes queries, keys and values by one layer, and a gated MLP's two inputs by
another. An adapter of such a layer has one A, which Hugging Face's layers share, and a
B whose columns are theirs. So files of adapters have Hugging Face's names only.
"""

from __future__ import annotations

import dataclasses
import re
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
        factors, scales = {}, {}
        for name, (a, b) in adapter.factors.items():
            rows = self.rows(name) or [torch.arange(b.shape[1])]
            for part, columns in zip(self.parts[name], rows, strict=True):
                factors[part] = (a.clone(), b[:, columns].contiguous())
                scales[part] = adapter.config.scale_of(name)
        return _renamed(adapter, factors, scales)

    def from_hf(self, adapter: Adapter, may_stack: bool = False) -> Adapter:
        """The adapter of Megatron's layers that changes them by the same.

        Args:
            adapter: Its names are Hugging Face's.
            may_stack: Of layers that are one in Megatron take also a part, and more
                than one A. The rank is then the sum of theirs.

        Raises:
            ValueError: layers that are one in Megatron are not all there, or have not
                one A, and this may not stack them; or a layer is not known.

        """
        factors, scales = {}, {}
        left = set(adapter.factors)
        for name, parts in self.parts.items():
            if left.isdisjoint(parts):
                continue
            found = {part: adapter.factors[part] for part in parts if part in left}
            scale = {part: adapter.config.scale_of(part) for part in found}
            ones = [a for a, _ in found.values()]
            same = all(torch.equal(ones[0], a) for a in ones[1:])
            same &= len(set(scale.values())) == 1 and len(found) == len(parts)
            if same:
                whole = self._joined(name, [b for _, b in found.values()], 1)
                factors[name] = (ones[0], whole)
            elif may_stack:
                factors[name] = self._stacked(name, found, scale)
            else:
                raise ValueError(
                    f"{', '.join(parts)} are one layer of Megatron's, so an adapter "
                    "has to change all of them, with one lora_A and one scale. Load it "
                    "with the trainer that made it."
                )
            left.difference_update(parts)
            scales[name] = next(iter(scale.values()))
        if left:
            raise ValueError(
                f"Megatron's model has no layer {', '.join(sorted(left))}."
            )
        return _renamed(adapter, factors, scales)

    def _stacked(
        self,
        name: str,
        found: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        scale: Mapping[str, float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pair for the layer, times the scale of the first of its parts."""
        rows = self.rows(name)
        assert rows is not None
        first = next(iter(scale.values()))
        whole = torch.cat([a for a, _ in found.values()])  # [ranks of all, inputs]
        b = whole.new_zeros(len(whole), sum(map(len, rows)))  # [ranks of all, outputs]
        start = 0
        for part, columns in zip(self.parts[name], rows, strict=True):
            if part in found:
                own = found[part][1] * (scale[part] / first)
                b[start : start + len(own), columns] = own
                start += len(own)
        return whole, b

    def _joined(
        self, name: str, parts: Iterable[torch.Tensor], axis: int
    ) -> torch.Tensor:
        rows = self.rows(name)
        whole = torch.cat(list(parts), axis)
        if rows is None:
            return whole
        order = torch.cat(rows).argsort().to(whole.device)
        return whole.index_select(axis, order)


def _renamed(
    adapter: Adapter,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    scales: Mapping[str, float],
) -> Adapter:
    """An adapter of `factors`, whose outputs are multiplied by `scales`."""
    names = {name: re.escape(name) for name in factors}
    plain = dataclasses.replace(
        adapter.config,
        target_modules=tuple(factors),
        exclude_modules=None,
        rank_pattern={names[name]: len(a) for name, (a, _) in factors.items()},
        alpha_pattern={},
    )
    other = {name: s / plain.scale_of(name) for name, s in scales.items()}
    config = dataclasses.replace(
        plain,
        rank_pattern={
            names[name]: len(a)
            for name, (a, _) in factors.items()
            if len(a) != plain.rank
        },
        alpha_pattern={
            names[n]: plain.alpha * by for n, by in other.items() if by != 1
        },
    )
    return Adapter(config, factors)
