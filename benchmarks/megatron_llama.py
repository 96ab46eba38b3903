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
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import nn

from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.trainable_attention.megatron import CoreAttention

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


class ServingRowParallelLinear(RowParallelLinear):
    """Megatron's layer without a bias, with vLLM's all-reduce instead of NCCL's.

    vLLM's is the faster one for the few tokens of a decode step.
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        output = F.linear(input_, self.weight)
        return tensor_model_parallel_all_reduce(output), None


class MegatronLlama(GPTModel):
    """`[tokens]` ids and positions -> hidden states `[tokens, hidden]`.

    It keeps the random weights that Megatron made.
    """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load nothing, because speed does not depend on the weights."""

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[tokens]` -> `[tokens, hidden]`."""
        return self.embedding.word_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of a stage after the first, `inputs_embeds` is what the one before sent."""
        embedded = None
        if inputs_embeds is None:
            embedded = self.embedding(input_ids.unsqueeze(0), positions.unsqueeze(0))
        elif self.pre_process:
            embedded = inputs_embeds.unsqueeze(1)  # [tokens, 1, hidden]
        else:
            # A copy: of a view Megatron makes a leaf, which torch.compile cannot trace.
            self.set_input_tensor(inputs_embeds.unsqueeze(1).clone())
        inv_freq = self.rotary_pos_emb.inv_freq
        angles = positions[:, None] * inv_freq  # [tokens, head_dim / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, None, None]
        hidden = self.decoder(embedded, attention_mask=None, rotary_pos_emb=angles)
        return hidden.squeeze(1)


def build(
    shape: LlamaShape,
    groups: "ProcessGroupCollection",
    model_cls: type[GPTModel] = MegatronLlama,
    core_attention: type[nn.Module] | None = CoreAttention,
    row_parallel: type[nn.Module] | None = None,
    **options: Any,
) -> Any:
    """The pipeline stage and tensor-parallel shard of `groups`.

    Its dtype is PyTorch's default. None stands for Megatron's own module; `options`
    are more of `TransformerConfig`.
    """
    initialize_rng_tracker(inference_rng_tracker=True)  # there is no dropout
    dtype = torch.get_default_dtype()
    config = TransformerConfig(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        **options,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention, mlp = (spec.submodules.self_attention, spec.submodules.mlp)
    if core_attention is not None:
        attention.submodules.core_attention = core_attention
    if row_parallel is not None:
        attention.submodules.linear_proj = mlp.submodules.linear_fc2 = row_parallel
    return model_cls(
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
