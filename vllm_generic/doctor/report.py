# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What was found, as a table, as JSON and as an exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["ok", "note", "refused"]
STYLES = {"ok": "green", "note": "yellow", "refused": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row of a report.

    Args:
        subject: What it is about, such as "attention".
        state: "refused" if the engine would not start, or would not do what was asked.
        text: What was seen, with values.
        write: What to write to change that; empty if there is nothing to do.

    """

    subject: str
    state: State
    text: str
    write: str = ""


@dataclass
class Report:
    """All findings about `model`, in the order in which an engine reaches them."""

    model: str
    findings: list[Finding] = field(default_factory=list)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def add(self, subject: str, state: State, text: str, write: str = "") -> None:
        self.findings.append(Finding(subject, state, text, write))

    def of(self, subject: str) -> list[Finding]:
        """The findings about `subject`."""
        return [found for found in self.findings if found.subject == subject]

    @property
    def refused(self) -> list[Finding]:
        return [found for found in self.findings if found.state == "refused"]

    @property
    def exit_code(self) -> int:
        """1 if anything is refused, else 0: for `sys.exit`."""
        return 1 if self.refused else 0

    def to_json(self) -> str:
        """An object with `model`, `serves` and `findings`."""
        content = {
            "model": self.model,
            "serves": not self.refused,
            "findings": [asdict(found) for found in self.findings],
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def print_table(self) -> None:
        """Print the report to standard output."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        verdict = "refused" if self.refused else "ok"
        title = Text.assemble(
            f"{self.model}: ",
            ("REFUSED" if self.refused else "SERVES", STYLES[verdict]),
        )
        table = Table(title=title, show_header=False, show_lines=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for found in self.findings:
            # Text, because square brackets of shapes are no markup.
            text = Text(found.text)
            if found.write:
                text.append(f"\nwrite: {found.write}", "cyan")
            table.add_row(Text(found.subject, STYLES[found.state]), text)
        return table
