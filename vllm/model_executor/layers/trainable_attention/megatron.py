# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`TrainableAttention` as the core attention of megatron-core's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm.model_executor.layers.trainable_attention.attention import (
    TrainableAttention,
)

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig


class CoreAttention(TrainableAttention):
    """`TrainableAttention` with the interface of Megatron's core attention.

    Put it into a layer's spec where a model is called with flattened tokens, as vLLM
    and trainers with packed sequences do: it is causal, and takes no mask. A
    `GPTModel` that is called as Megatron calls it serves without.

    Args:
        config: Of the model.
        layer_number: From 1 on; the layer is `decoder.layers.{layer_number - 1}`.
        pg_collection: Megatron's groups; heads are divided over `tp`.
        softmax_scale: Factor of the scores. Default: `head_dim**-0.5`.
        options: Of Megatron's own class; none of them changes what is computed here.

    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **options: Any,
    ) -> None:
        ranks = pg_collection.tp.size()
        super().__init__(
            config.num_attention_heads // ranks,
            config.kv_channels,
            config.num_query_groups // ranks,
            scale=softmax_scale,
            prefix=f"decoder.layers.{layer_number - 1}.self_attention.core_attention",
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[tokens, 1, heads, head_dim]` each -> `[tokens, 1, heads * head_dim]`."""
        out = super().forward(query.squeeze(1), key.squeeze(1), value.squeeze(1))
        return out.flatten(1).unsqueeze(1)
