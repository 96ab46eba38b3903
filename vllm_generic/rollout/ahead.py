# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batches that are answered while the trainer trains on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm_generic.rollout.module import VLLMModule

logger = init_logger(__name__)
Batch = dict[str, Any]


@dataclass
class _Pending:
    data: Batch
    iteration: int
    answer: Future[Batch]


def answered_ahead(
    module: VLLMModule,
    batches: Iterable[Batch],
    max_versions_behind: int = 1,
    iteration: int = 0,
) -> Iterator[tuple[Batch, Batch]]:
    """Batches in their order, each with its answers; later ones are under way.

        for data, batch in answered_ahead(module, batches, max_versions_behind=1):
            ...  # a step of the trainer
            module.parameter_sync(trainer_module)

    Each token is of weights that are at most `max_versions_behind` updates old when its
    batch is handed out. So many batches are under way meanwhile, also during an update
    of the weights. A batch that has become older, because the trainer made more
    updates, is answered again. When the loop is left, what is under way is ended.

    Args:
        module: With `asynchronous: true`, or `engine_urls`.
        batches: What `VLLMModule.forward_step` takes.
        max_versions_behind: How many updates a token's weights may be behind. 0 is
            the synchronous loop.
        iteration: The number of the first batch; see `forward_step`.

    Yields:
        The batch's prompts, and what `forward_step` returns for them.

    Raises:
        ValueError: `max_versions_behind` is negative.

    """
    if max_versions_behind < 0:
        raise ValueError(
            f"max_versions_behind is {max_versions_behind}; expected 0 or more."
        )
    source = enumerate(batches, iteration)
    under_way: deque[_Pending] = deque()

    def begin() -> None:
        for number, data in source:
            under_way.append(_Pending(data, number, module.begin_step(data, number)))
            if len(under_way) > max_versions_behind:
                return

    try:
        begin()
        while under_way:
            pending = under_way[0]
            batch = pending.answer.result()
            behind = versions_behind(batch, module.weight_version)
            if behind > max_versions_behind:
                logger.info(
                    "Batch %d is %d updates behind, and is answered again.",
                    pending.iteration,
                    behind,
                )
                batch = module.forward_step(pending.data, pending.iteration)
            under_way.popleft()
            yield pending.data, batch
            begin()
    finally:
        for pending in under_way:
            pending.answer.cancel()


def versions_behind(batch: Batch, version: int) -> int:
    """How many updates the oldest sampled token's weights are behind `version`."""
    versions = batch["weight_versions"][batch["loss_mask"] > 0]
    return version - int(versions.min()) if len(versions) else 0
