# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A run's live table, its log as JSON lines, and its curves as a picture."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import matplotlib
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

ROWS = 12


def show(text: str) -> None:
    """Print on the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


class Report:
    """Shows each step as it ends; on the first rank only.

    Args:
        directory: Where `log.jsonl` and `curves.png` are written.
        steps: Of the whole run.
        done: Steps of a run that goes on; later ones in its log are forgotten.

    """

    def __init__(self, directory: Path, steps: int, done: int) -> None:
        self._shown = int(os.environ.get("RANK", 0)) == 0
        self._picture = directory / "curves.png"
        self._log = directory / "log.jsonl"
        lines = self._log.read_text().splitlines() if done else []
        self._rows = [json.loads(line) for line in lines[:done]]
        self._seconds: dict[str, float] = defaultdict(float)
        self._bar = Progress()
        self._task = self._bar.add_task("training", total=steps, completed=done)
        self._live = Live(self._bar)

    def __enter__(self) -> "Report":
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown:
            self._live.stop()
            self._draw()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - start

    def add(self, step: int, tokens: float, values: dict[str, float]) -> None:
        """One step, of `tokens` sampled tokens."""
        speed = {"tokens/s": tokens / self._seconds["rollout"]}
        times = {f"{name} [s]": value for name, value in self._seconds.items()}
        self._rows.append({"step": step} | values | speed | times)
        self._seconds.clear()
        if not self._shown:
            return
        self._log.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        table = Table(*self._rows[-1])
        for row in self._rows[-ROWS:]:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        self._bar.update(self._task, completed=step)
        self._live.update(Group(table, self._bar))

    def _draw(self) -> None:
        if not self._rows:
            return
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = ("reward", "entropy", "length", "max |Δ log p|")
        figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
        for axis, name in zip(axes.flat, names, strict=True):
            axis.plot([r["step"] for r in self._rows], [r[name] for r in self._rows])
            axis.set(xlabel="step", ylabel=name)
        figure.savefig(self._picture)
        plt.close(figure)
