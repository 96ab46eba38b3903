# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Paged attention on a CPU that rounds as attention in training does.

vLLM's kernel divides the keys by how many threads and requests there are. Here each
sequence is attended by the kernel of training, as if all of it were computed again.
That costs as much as training does, and is for comparisons and tests.
"""

from typing import Any

import torch

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.training.kernel import AttentionParams
from vllm.v1.attention.training.select import select_kernel
from vllm.v1.attention.training.sequences import Sequences


class CPUAttentionInvariantImpl(CPUAttentionBackendImpl):
    """Keys and values lie in the cache as they are, not packed for a kernel."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        # [blocks, kv_heads, tokens of a block, 2 * head_dim]
        block_size = kv_cache.shape[2]
        here = slot_mapping >= 0
        slots = slot_mapping[here]
        tokens = torch.cat([key, value], -1)[: len(here)][here]
        kv_cache[slots // block_size, :, slots % block_size] = tokens

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # a warm-up step
            return output.fill_(0)
        block_size = kv_cache.shape[2]
        starts = attn_metadata.query_start_loc.tolist()
        for index, length in enumerate(attn_metadata.seq_lens.tolist()):
            tokens = slice(starts[index], starts[index + 1])
            if tokens.start == tokens.stop:
                continue
            blocks = attn_metadata.block_table[index, : -(-length // block_size)]
            # [blocks, kv_heads, tokens, 2 * head_dim] -> [tokens, kv_heads, ...]
            cached = kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:length]
            out = self._attend(query[tokens], *cached.chunk(2, -1))
            output[tokens] = out.view_as(output[tokens])
        return output

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """The last tokens of a sequence, `[tokens, heads, head_dim]`."""
        length = len(key)
        # Zeros in place of earlier queries: no row depends on another.
        whole = query.new_zeros(length, self.num_heads, self.head_size)
        whole[length - len(query) :] = query.view(-1, self.num_heads, self.head_size)
        params = AttentionParams(
            scale=self.scale,
            causal=True,
            sliding_window=None if self.sliding_window < 0 else self.sliding_window,
            logits_soft_cap=self.logits_soft_cap or None,
            dropout=0.0,
            deterministic=False,
            sinks=self.sinks,
        )
        sequence = Sequences(num_seqs=1, max_seqlen=length)
        kernel = select_kernel(whole, key, sequence, params)
        out = kernel(whole, key, value, sequence, params)
        return out[length - len(query) :]


def attend_as_in_training(paged: Any) -> None:
    """Have vLLM's causal attention layer on a CPU round as training does."""
    paged.impl.__class__ = CPUAttentionInvariantImpl
