# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A step of the engine without its scheduler: attention metadata of chosen tokens.

The KV caches and the builders of metadata are the model runner's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.utils import AttentionGroup

from .schedule import Piece


class EngineBatches:
    """Makes forwards parts of requests that have blocks of the engine's caches.

    Nothing has been cached yet, so every block but block 0, which vLLM leaves out, is
    free.

    Args:
        groups: The attention layers of the model, by group of KV caches.
        num_blocks: Blocks of each cache.
        lengths: Tokens of each request.

    Raises:
        ValueError: There are not enough blocks.

    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        groups: list[list[AttentionGroup]],
        num_blocks: int,
        lengths: list[int],
        device: torch.device,
    ) -> None:
        self._vllm_config = vllm_config
        self._groups = groups
        self._device = device
        self._tables: list[torch.Tensor] = []  # of each group [requests, blocks]
        first = 1
        for group in groups:
            spec = group[0].kv_cache_spec
            extra = spec.num_speculative_blocks if isinstance(spec, MambaSpec) else 0
            counts = [cdiv(length, spec.block_size) + extra for length in lengths]
            starts = accumulate(counts[:-1], initial=first)
            self._tables.append(
                self._table(_block_size(group[0]), spec.block_size, starts, counts)
            )
            first += sum(counts)
        if groups and first > num_blocks:
            raise ValueError(f"it takes {first} blocks of the {num_blocks} of a cache")

    def _table(
        self, kernel_block: int, block: int, starts: Iterator[int], counts: list[int]
    ) -> torch.Tensor:
        """Each request's blocks, in the blocks that kernels see, `[requests, width]`.

        The width is that of the longest request which the engine takes.
        """
        parts = block // kernel_block
        model_config = self._vllm_config.model_config
        width = max(cdiv(model_config.max_model_len, block), *counts) * parts
        table = torch.zeros(len(counts), width, dtype=torch.int32)
        for row, start, number in zip(table, starts, counts, strict=True):
            row[: number * parts] = torch.arange(
                start * parts, (start + number) * parts
            )
        return table.to(self._device)

    @contextmanager
    def step(self, pieces: list[Piece]) -> Iterator[None]:
        """The forward inside is an engine's, of `pieces` one after the other."""
        metadata, slots = self.metadata(pieces)
        with set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=sum(piece.tokens for piece in pieces),
            slot_mapping=slots,
            skip_compiled=True,
        ):
            yield

    def metadata(
        self, pieces: list[Piece]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Of each attention layer the metadata, and the slots of the cache."""
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for group, table in zip(self._groups, self._tables, strict=True):
            common = self._common(pieces, table, _block_size(group[0]))
            for part in group:
                built = _build(part, common)
                metadata |= dict.fromkeys(part.layer_names, built)
                slots |= dict.fromkeys(part.layer_names, common.slot_mapping)
        return metadata, slots

    def _common(
        self, pieces: list[Piece], tables: torch.Tensor, block_size: int
    ) -> CommonAttentionMetadata:
        lengths = [piece.tokens for piece in pieces]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        ends = torch.tensor([piece.end for piece in pieces], dtype=torch.int32)
        positions = positions_of(pieces).to(self._device)
        rows = torch.tensor([piece.request for piece in pieces])
        table = tables[rows.to(self._device)]  # [pieces, width]
        row_of_token = torch.arange(len(pieces)).repeat_interleave(
            torch.tensor(lengths)
        )
        blocks = table[row_of_token.to(self._device), positions // block_size]
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self._device),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(self._device),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(pieces),
            num_actual_tokens=sum(lengths),
            max_query_len=max(lengths),
            max_seq_len=int(ends.max()),
            block_table_tensor=table,
            slot_mapping=blocks.long() * block_size + positions % block_size,
            positions=positions,
            is_prefilling=torch.tensor([not piece.is_decode for piece in pieces]),
        )


def positions_of(pieces: list[Piece]) -> torch.Tensor:
    """The position of each token in its request (int64)."""
    return torch.cat([torch.arange(piece.start, piece.end) for piece in pieces])


def _block_size(group: AttentionGroup) -> int:
    """Tokens of a block as slot mappings of the group's layers see it."""
    if getattr(group, "kernel_block_size", None) is not None:  # maps blocks itself
        return group.kv_cache_spec.block_size
    return group.get_metadata_builder(0).kv_cache_spec.block_size


def _build(group: AttentionGroup, common: CommonAttentionMetadata) -> Any:
    if hasattr(group, "build_metadata"):  # since vLLM 0.32
        return group.build_metadata(common)
    return group.get_metadata_builder(0).build(0, common)
