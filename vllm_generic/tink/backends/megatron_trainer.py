# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training by megatron-core: a GPTModel with the weights of a Hugging Face model.

Its layers are adapted as those of any module are. Adapters are read and written with
Hugging Face's names, so that every sampler has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import vllm.envs as envs
from vllm.config import ParallelConfig, VllmConfig
from vllm.distributed import model_parallel_is_initialized
from vllm.lora.adapter import Adapter
from vllm.model_executor.layers.trainable_attention.megatron import CoreAttention
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.model_executor.parallel_context import ParallelContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm_generic.alone import make_groups_of_one
from vllm_generic.tink.backends.megatron_names import Names
from vllm_generic.tink.backends.module_trainer import ModuleTrainer
from vllm_generic.tink.backends.packed_model import check_logits

FAMILIES = ("llama", "qwen2", "qwen3")  # model types of configs


class MegatronTrainer(ModuleTrainer):
    """Adapters of a Megatron model.

    Args:
        base: a Hugging Face model, whose weights are copied.
        packed: one pass has the sequences of many runs.

    Raises:
        ImportError: megatron-core is not installed.
        ValueError: the model has something that this does not build.

    """

    def __init__(self, base: Any, packed: bool) -> None:
        self._names = Names(base.config)
        model = megatron_model(base)
        if envs.VLLM_BATCH_INVARIANT:  # the engine divides these sums on one rank, too
            sum_as_divided(model)
        super().__init__(model, packed)

    def export(self, run: str) -> Adapter:
        return self._names.to_hf(super().export(run))

    def read(self, folder: Path) -> Adapter:
        return self._names.from_hf(super().read(folder))


class MegatronModel(nn.Module):
    """A GPTModel that is called with packed sequences, as an engine calls a module.

    Names of parameters are GPTModel's.

    Args:
        config: Hugging Face's.
        context: the place of this process, whose groups are initialized.

    """

    inverse_frequencies: torch.Tensor

    def __init__(self, config: Any, context: ParallelContext) -> None:
        super().__init__()
        self.config = config
        model = _gpt_model(config, context.megatron_groups())
        self.embedding = model.embedding
        self.decoder = model.decoder
        self.output_layer = model.output_layer
        rotary = LlamaRotaryEmbedding(config)
        if rotary.attention_scaling != 1:
            raise ValueError(
                f"rope_parameters={config.rope_parameters} scale the attention, which "
                "is not built with Megatron; train with --trainer module."
            )
        self.register_buffer("inverse_frequencies", rotary.inv_freq, persistent=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.output_layer

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output_layer(hidden_states)[0]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states `[tokens, hidden]` of packed `[tokens]`."""
        embedded = self.embedding(input_ids[None], positions[None])
        angles = positions[:, None].float() * self.inverse_frequencies
        # [tokens, head_dim / 2] -> [tokens, batch=1, heads=1, head_dim]
        angles = torch.cat((angles, angles), -1)[:, None, None]
        hidden = self.decoder(embedded, attention_mask=None, rotary_pos_emb=angles)
        return hidden.squeeze(1)


def megatron_model(base: Any) -> MegatronModel:
    """A Megatron model with the weights of `base`, checked against it.

    Raises:
        ValueError: it is of no family that is built, or computes something else.

    """
    config = base.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"A model of type {config.model_type!r} is not built with Megatron; "
            f"expected one of {', '.join(FAMILIES)}. Train with --trainer module."
        )
    context = _alone()
    with set_default_torch_dtype(base.dtype):  # its rotary frequencies stay in float32
        model = MegatronModel(config, context)
    weights = dict(base.state_dict())
    # the head is a layer of its own also where it shares the embedding's weight
    weights["lm_head.weight"] = base.get_output_embeddings().weight
    load_full_checkpoint(model, Names(config).tensors(weights).items(), context)
    model = model.to(base.device).eval().requires_grad_(False)
    check_logits(base, model, "it is built with Megatron")
    return model


def _alone() -> ParallelContext:
    """The groups of one process, which are made once."""
    parallel = ParallelConfig()
    if not model_parallel_is_initialized():
        make_groups_of_one(VllmConfig(parallel_config=parallel))
    return ParallelContext.from_config(parallel)


def _gpt_model(config: Any, groups: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import TransformerConfig

    initialize_rng_tracker(inference_rng_tracker=True)  # there is no dropout
    heads = config.num_attention_heads
    is_qwen3 = config.model_type == "qwen3"
    transformer_config = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        tensor_model_parallel_size=groups.tp.size(),
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        qk_layernorm=is_qwen3,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        params_dtype=torch.get_default_dtype(),  # an engine sets it to its own
        perform_initialization=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=is_qwen3)
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return GPTModel(
        transformer_config,
        spec,
        config.vocab_size,
        config.max_position_embeddings,
        position_embedding_type="none",  # given to the decoder by positions
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )
