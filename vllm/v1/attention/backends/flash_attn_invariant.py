# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FlashAttention 3 whose decode steps round like its longer queries do.

For a single query FA3 drops the causal flag. At some head sizes it then reads the keys
in blocks of another size, which gives other bits. It does not do so within a sliding
window. So layers of these head sizes get a window that is longer than any sequence and
hides nothing (tried on an H200: head sizes 64, 72, 80 and 96; from 112 on there is no
difference).
"""

from dataclasses import replace
from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)


def changes_bits_at_decode(head_dim: int) -> bool:
    """Whether FA3, if it is what vLLM uses, needs the window at this head size."""
    return head_dim < 112 and get_flash_attn_version(head_size=head_dim) == 3


class FlashAttentionInvariantMetadataBuilder(FlashAttentionMetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> FlashAttentionMetadata:
        # FA3 ignores a window that `max_seq_len` fits into, so this is raised.
        longest = self.model_config.max_model_len
        common_attn_metadata = replace(common_attn_metadata, max_seq_len=longest)
        return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)


class FlashAttentionInvariantBackend(FlashAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[FlashAttentionInvariantMetadataBuilder]:
        return FlashAttentionInvariantMetadataBuilder


def keep_bits_at_decode(paged: Any, max_model_len: int) -> None:
    """Have a decode step of a FlashAttention layer round like a training step.

    Args:
        paged: A vLLM `Attention` whose `get_kv_cache_spec` passes
            `window_without_effect` on.
        max_model_len: The longest sequence, in tokens.
    """
    if paged.sliding_window is None and changes_bits_at_decode(paged.head_size):
        # The last token is never a query, so no query reaches beyond this window.
        paged.window_without_effect = max_model_len - 1
        paged.impl.sliding_window = (max_model_len - 2, 0)
        paged.attn_backend = FlashAttentionInvariantBackend
