# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A Llama of megatron-core's layers around `TrainableAttention`, for the benchmarks."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from llama import LlamaShape
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig

from vllm.model_executor.layers.trainable_attention import TrainableAttention

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


class CoreAttention(TrainableAttention):
    """TrainableAttention with the interface of Megatron's core attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: "ProcessGroupCollection",
        **_: Any,
    ) -> None:
        tp_size = pg_collection.tp.size()
        super().__init__(
            config.num_attention_heads // tp_size,
            config.kv_channels,
            config.num_query_groups // tp_size,
            prefix=f"decoder.layers.{layer_number - 1}.self_attention.core_attention",
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        # [tokens, batch=1, heads, head_dim] -> [tokens, 1, hidden / TP]
        out = super().forward(query.squeeze(1), key.squeeze(1), value.squeeze(1))
        return out.flatten(1).unsqueeze(1)


class MegatronLlama(GPTModel):
    """`[tokens]` ids and positions -> hidden states `[tokens, hidden]`.

    It keeps the weights that Megatron has made up.
    """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Nothing: speed does not depend on them."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids.unsqueeze(0), positions.unsqueeze(0))
        else:
            assert inputs_embeds is not None
            self.set_input_tensor(inputs_embeds.unsqueeze(1))
        inv_freq = self.rotary_pos_emb.inv_freq
        angles = positions[:, None] * inv_freq  # [tokens, head_dim / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, None, None]
        hidden = self.decoder(embedded, attention_mask=None, rotary_pos_emb=angles)
        return hidden.squeeze(1)


def build(shape: LlamaShape, groups: "ProcessGroupCollection") -> MegatronLlama:
    """The pipeline stage and tensor-parallel shard of `groups`, in bfloat16."""
    initialize_rng_tracker(inference_rng_tracker=True)  # there is no dropout
    config = TransformerConfig(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        bf16=True,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return MegatronLlama(
        config,
        spec,
        shape.vocab_size,
        shape.max_position_embeddings,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
        pg_collection=groups,
    )
