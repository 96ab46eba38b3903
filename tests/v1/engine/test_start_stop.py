# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines that start and stop again and again leak nothing."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from programs import Program

pytestmark = pytest.mark.engine

# Of growth by round, after the first two; the allocator keeps some of what it gets.
MEBIBYTES_A_ROUND = 1


@pytest.mark.parametrize(
    ("ranks", "rounds"),
    [
        (1, 4),
        pytest.param(1, 50, marks=pytest.mark.slow),
        pytest.param(2, 5, marks=pytest.mark.slow),
    ],
)
def test_rounds_leak_nothing(model_dir, tmp_path_factory, ranks, rounds):
    script = str(Path(__file__).with_name("rounds.py"))
    command = [sys.executable, script, str(model_dir), str(rounds), str(ranks)]
    with Program(command, tmp_path_factory.mktemp("program")) as program:
        assert program.ends_within(120 * ranks * rounds) == 0, program.output()
        program.leaves_nothing()
    # What a library prints when a process ends may stand before it in a line.
    lines = re.findall(r'\{"processes".*\}', program.output())
    held = [json.loads(line) for line in lines]
    assert len(held) == rounds
    memory = [after_round.pop("resident MiB") for after_round in held]
    if ranks == 1:
        assert all(after_round == held[0] for after_round in held), held
    for what in held[0]:  # connections to processes that are gone close when they may
        counts = [after_round[what] for after_round in held]
        assert not all(a < b for a, b in pairwise(counts)), (what, counts)
    # Multiprocessing's resource tracker lives as long as the program.
    assert held[0]["processes"] == 1
    if rounds > 2:
        assert memory[-1] - memory[1] <= MEBIBYTES_A_ROUND * (rounds - 2), memory
