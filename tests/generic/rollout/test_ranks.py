# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the first rank of a trainer does, every rank gets: results and failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from vllm.model_executor.parallel_context import ParallelContext
from vllm_generic.rollout import VLLMModule
from vllm_generic.rollout.ranks import on_first_rank


def on_two_ranks(context: ParallelContext) -> None:
    calls = []

    def answer() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"all_tokens": torch.arange(3)}

    assert on_first_rank(answer)["all_tokens"].tolist() == [0, 1, 2]
    assert len(calls) == (1 if dist.get_rank() == 0 else 0)

    def fail() -> None:
        raise ValueError("Prompt 3 of the batch is wrong.")

    # The first rank raises what happened, and no other rank waits for it.
    error = ValueError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(error, match="Prompt 3 of the batch is wrong"):
        on_first_rank(fail)
    # An engine that cannot start is an error on every rank.
    error = ValueError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(error, match="no key model"):
        VLLMModule({}).setup()


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(on_two_ranks, tmp_path, data_parallel_size=2)


def test_one_process_needs_no_group() -> None:
    assert on_first_rank(lambda: 3) == 3
