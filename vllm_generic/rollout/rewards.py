# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rewards of a batch, by a function that may fail or hang."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Row = dict[str, Any]


def score(
    reward: Callable[[Row], float],
    batch: Mapping[str, Any],
    data: Mapping[str, Sequence[Any]],
    *,
    timeout: float = 60.0,
    workers: int = 1,
) -> torch.Tensor:
    """The reward of each answer.

    Args:
        reward: Gets the columns of `data` for the answer's prompt, and `output` (the
            answer's text), `output_ids` (its tokens) and `finish_reason`.
        batch: What `VLLMModule.forward_step` has returned.
        data: What it was called with.
        timeout: Seconds without a reward, after which those under way have failed.
        workers: Threads that call `reward`.

    Returns:
        float32 `[samples]`.

    Raises:
        RuntimeError: `reward` raises, or returns no finite number.
        TimeoutError: it does not return. Its thread is left behind, and does not keep
            the program from ending.

    """
    rows = _rows(batch, data)
    prompts = batch["prompt_index"].tolist()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, float, Exception | None]] = queue.SimpleQueue()
    under_way: set[int] = set()
    for index in range(len(rows)):
        todo.put(index)

    def work() -> None:
        while True:
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            under_way.add(index)
            try:
                done.put((index, float(reward(rows[index])), None))
            except Exception as error:
                done.put((index, math.nan, error))

    for _ in range(min(workers, len(rows))):
        threading.Thread(target=work, name="reward", daemon=True).start()
    rewards = torch.zeros(len(rows))
    try:
        for _ in rows:
            try:
                index, value, error = done.get(timeout=timeout)
            except queue.Empty:
                hung = sorted({prompts[index] for index in under_way})
                raise TimeoutError(
                    f"The reward of prompt {', '.join(map(str, hung))} of the batch "
                    f"has not come in {timeout} s."
                ) from None
            under_way.discard(index)
            if error is not None or not math.isfinite(value):
                reason = f"{type(error).__name__}: {error}" if error else str(value)
                raise RuntimeError(
                    f"The reward of prompt {prompts[index]} of the batch (row {index}) "
                    f"is no finite number: {reason}"
                ) from error
            rewards[index] = value
    finally:
        while not todo.empty():
            todo.get_nowait()
    return rewards


def _rows(batch: Mapping[str, Any], data: Mapping[str, Sequence[Any]]) -> list[Row]:
    rows = []
    for sample, prompt in enumerate(batch["prompt_index"].tolist()):
        begin = len(batch["no_padded_query_ids"][sample])
        end = int(batch["lengths"][sample])
        row = {name: column[prompt] for name, column in data.items()}
        rows.append(
            row
            | {
                "output": batch["str_outputs"][sample],
                "output_ids": batch["all_tokens"][sample, begin:end].tolist(),
                "finish_reason": batch["finish_reasons"][sample],
            }
        )
    return rows
