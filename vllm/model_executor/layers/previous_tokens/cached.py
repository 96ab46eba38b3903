# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The last tokens of each request, in a cache of vLLM's for recurrent states.

vLLM treats the layer like Mamba's: each request has one block, from its first token to
its last. A request that is preempted gets a new block when its tokens are read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.trainable_attention.paged import free_name
from vllm.utils.math_utils import round_up
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec


@dataclass
class PreviousTokensMetadata:
    """Which tokens and which block of the cache each request of a step has.

    Args:
        query_start_loc: int32 `[requests + 1]`, where the tokens of each begin.
        seq_lens: int32 `[requests]`, tokens of each up to the end of this step.
        blocks: int32 `[requests]`.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    blocks: torch.Tensor


class PreviousTokensMetadataBuilder(AttentionMetadataBuilder[PreviousTokensMetadata]):
    # A decode step has the same shapes whenever it has as many requests.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: MambaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PreviousTokensMetadata:
        return PreviousTokensMetadata(
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            blocks=common_attn_metadata.block_table_tensor[:, 0],
        )


class PreviousTokensBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "PREVIOUS_TOKENS"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("PreviousTokens has no attention kernel.")

    @staticmethod
    def get_builder_cls() -> type[PreviousTokensMetadataBuilder]:
        return PreviousTokensMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class CachedPreviousTokens(nn.Module, MambaBase):
    """The engine's half of a `PreviousTokens`."""

    def __init__(
        self, channels: int, tokens: int, dtype: torch.dtype, layer_name: str
    ) -> None:
        super().__init__()
        self.channels = channels
        self.tokens = tokens
        self.dtype = dtype
        self.layer_name = layer_name
        # vLLM binds the cache: [blocks, tokens, channels], the oldest token first.
        self.kv_cache: tuple[torch.Tensor, ...] = (torch.tensor([]),)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.tokens, self.channels),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (self.dtype,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PreviousTokensBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        # A block is longer than any request: each has one, and none is ever full, so
        # that no prefix is found for which there is no state.
        longest = vllm_config.model_config.max_model_len
        block_size = vllm_config.cache_config.block_size
        return MambaSpec(
            block_size=round_up(longest + 1, block_size),
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            mamba_type=self.mamba_type,
            mamba_cache_mode="none",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The graph that follows reads where it read when it was recorded. So what the
        # operator finds has its place in the graph before, as an attention's output.
        found = x.new_empty(len(x), self.tokens, x.shape[-1])
        torch.ops.vllm.previous_tokens(x, found, self.layer_name)
        return found

    def look_back(
        self, x: torch.Tensor, metadata: PreviousTokensMetadata
    ) -> torch.Tensor:
        """`[tokens, previous, channels]` of `x` `[tokens, channels]`; keeps the last.

        All shapes are known without reading the device. What is padded at the end of
        `x` belongs to no request.
        """
        state, previous = self.kv_cache[0], self.tokens
        starts = metadata.query_start_loc[:-1].long()
        ends = metadata.query_start_loc[1:].long()
        lengths = ends - starts  # [requests]
        # Padded requests have no block; block 0 is nobody's.
        blocks = metadata.blocks.clamp(min=0).long()
        ages = torch.arange(previous, 0, -1, device=x.device)
        computed = metadata.seq_lens - lengths
        exists = ages <= computed.unsqueeze(-1)  # [requests, previous]
        before = state[blocks].where(exists.unsqueeze(-1), 0)

        def joined(request: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            """Values at `place` of a request's chunk; a place < 0 is before it.

            Args:
                request: `[n]`.
                place: `[n, previous]`.

            """
            index = (starts[request].unsqueeze(-1) + place).clamp(0, len(x) - 1)
            earlier = (place + previous).clamp(0, previous - 1)
            return torch.where(
                (place >= 0).unsqueeze(-1),
                x[index].to(state.dtype),
                before[request.unsqueeze(-1), earlier],
            )

        token = torch.arange(len(x), device=x.device)
        request = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
        offset = token - starts[request]
        found = joined(request, offset.unsqueeze(-1) - ages).to(x.dtype)
        every_request = torch.arange(len(ends), device=x.device)
        state[blocks] = joined(every_request, lengths.unsqueeze(-1) - ages)
        return found


def previous_tokens(x: torch.Tensor, found: torch.Tensor, layer_name: str) -> None:
    """The operator in compiled code; vLLM runs it beside the graphs, as attention."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if metadata is None:  # a warm-up, before there are caches
        found.zero_()
        return
    assert isinstance(metadata, dict)
    layer = context.no_compile_layers[layer_name]
    found.copy_(layer.look_back(x, metadata[layer_name]))


def _fake(x: torch.Tensor, found: torch.Tensor, layer_name: str) -> None:
    pass


direct_register_custom_op(
    "previous_tokens", previous_tokens, mutates_args=["found"], fake_impl=_fake
)
OPERATOR = "vllm::previous_tokens"


def build_cached(
    channels: int, tokens: int, dtype: torch.dtype | None, prefix: str
) -> CachedPreviousTokens | None:
    """The engine's half of a layer; None where no engine is building a model.

    Raises:
        ValueError: `prefix` is taken or has not exactly one integer, or the engine
            decodes speculatively.

    """
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or vllm_config.model_config is None:
        return None
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "PreviousTokens cannot take tokens back, as speculative decoding does. "
            "Start without speculative_config."
        )
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    if not prefix:
        built = sum(
            isinstance(layer, CachedPreviousTokens) for layer in layers.values()
        )
        prefix = free_name(vllm_config, "previous_tokens", built)
    if sum(part.isdecimal() for part in prefix.split(".")) != 1 or prefix in layers:
        raise ValueError(
            f"prefix {prefix!r} must contain exactly one integer and be no other "
            "layer's. Leave prefix out to have one made."
        )
    if dtype is None:
        dtype = cast(torch.dtype, vllm_config.model_config.dtype)
    layers[prefix] = cached = CachedPreviousTokens(channels, tokens, dtype, prefix)
    splitting = vllm_config.compilation_config.splitting_ops
    if splitting is not None and OPERATOR not in splitting:
        splitting.append(OPERATOR)
    return cached
