# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a comparison of a served model with its reference found, and whether it passed.

A report is a table, JSON and an exit code. It knows tokens and their numbers only, not
where these came from.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.console import Group

# How many tokens or ranks are listed at the most.
LISTED = 8
# Relative: a few units in the last place of the float32 that an engine reports.
RESOLUTION = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Thresholds:
    """What a report has to keep to pass.

    The defaults are for float32 on both sides, where what is left is rounding. Limits
    of |Δ log p| that are not zero grow to what float32 resolves of the log-probs, which
    matters for those below -200.

    Args:
        greedy_agreement: Least fraction of generated tokens that are the reference's
            own first choice.
        max_logprob_diff: Largest |Δ log p| of any token, in nats.
        mean_logprob_diff: Largest mean |Δ log p|, in nats.
        max_kl: Largest KL(served || reference) at any generated token, in nats. The
            default is what errors of `max_logprob_diff` in all log-probs add up to.

    """

    greedy_agreement: float = 1.0
    max_logprob_diff: float = 1e-4
    mean_logprob_diff: float = 1e-5
    max_kl: float = 1e-8


@dataclass(frozen=True)
class TokenComparison:
    """One token, as served and as the reference sees it.

    Args:
        prompt: Index of the prompt.
        position: Index in the sequence, prompt included.
        token_id: The token.
        generated: Whether the engine chose it; otherwise it is of the prompt.
        served_logprob: Its log-probability in the engine, in nats.
        reference_logprob: Its log-probability in the reference, in nats.
        rank: Its place in the reference's order, 1 for the most likely; tokens tied
            with it do not count. 0 if the reference's logits have NaNs.
        kl: KL(served || reference) over the log-probs served at this position, both
            sides normalized over these; None if fewer than two were served.
        finite: Whether all the above are finite numbers, or both log-probabilities
            are -inf: the token is masked on both sides.
        text: The token's text, if there is a tokenizer.

    """

    prompt: int
    position: int
    token_id: int
    generated: bool
    served_logprob: float
    reference_logprob: float
    rank: int
    kl: float | None
    finite: bool
    text: str = ""

    @property
    def logprob_diff(self) -> float:
        """|Δ log p| in nats; NaN if either side is, 0 if both are -inf."""
        if self.served_logprob == self.reference_logprob:
            return 0.0
        return abs(self.served_logprob - self.reference_logprob)

    @property
    def agrees(self) -> bool:
        """Whether the reference would have chosen this token, too."""
        return self.finite and self.rank == 1


@dataclass(frozen=True)
class Check:
    """One line of a report: `value` has to be `relation` (≤ or ≥) `limit`."""

    name: str
    value: float
    relation: str
    limit: float
    passed: bool


@dataclass(frozen=True)
class ValidationReport:
    """How a served model compares to its reference.

    Args:
        thresholds: What had to be kept.
        num_prompts: Prompts that were served.
        tokens: Every compared token, of prompts and generated.
        missing_tokens: Tokens that were asked for and not generated, or that came
            without a log-probability.
        kl_support: Over which log-probs the KL was taken.

    """

    thresholds: Thresholds
    num_prompts: int
    tokens: tuple[TokenComparison, ...]
    missing_tokens: int
    kl_support: str

    @property
    def generated(self) -> list[TokenComparison]:
        return [token for token in self.tokens if token.generated]

    @property
    def prompt_tokens(self) -> list[TokenComparison]:
        return [token for token in self.tokens if not token.generated]

    @property
    def greedy_agreement(self) -> float:
        """Fraction of generated tokens that the reference would have chosen."""
        return _mean([float(token.agrees) for token in self.generated])

    @property
    def rank_histogram(self) -> dict[int, int]:
        """Generated tokens by their rank in the reference's order; 1 is first."""
        return dict(sorted(Counter(token.rank for token in self.generated).items()))

    @property
    def checks(self) -> list[Check]:
        """Everything that has to hold, in the order of the table."""
        limits = self.thresholds
        generated, prompts = list(self.generated), list(self.prompt_tokens)
        kl = [token.kl for token in self.generated if token.kl is not None]
        broken = sum(not token.finite for token in self.tokens)
        agreement = self.greedy_agreement
        checks = [
            _at_most("missing tokens", self.missing_tokens, 0),
            _at_most("tokens with NaN or infinity", broken, 0),
            Check(
                "greedy agreement",
                agreement,
                "≥",
                limits.greedy_agreement,
                agreement >= limits.greedy_agreement,
            ),
            *_within("", generated, limits),
        ]
        if kl:
            checks.append(_at_most("max KL", _max(kl), limits.max_kl))
        if prompts:
            checks += _within("prompt ", prompts, limits)
        return checks

    @property
    def passed(self) -> bool:
        """Whether every check passed, on at least one generated token."""
        return bool(self.generated) and all(check.passed for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0 if passed, else 1: for `sys.exit`."""
        return 0 if self.passed else 1

    @property
    def worst(self) -> list[TokenComparison]:
        """The tokens to look at first: broken, then disagreeing, then by |Δ log p|."""
        return sorted(
            self.tokens,
            key=lambda token: (
                token.finite,
                token.agrees or not token.generated,
                -token.logprob_diff if token.finite else 0.0,
            ),
        )[:LISTED]

    def to_json(self) -> str:
        """The report as a JSON object; numbers that are not finite become null."""
        report = {
            "passed": self.passed,
            "num_prompts": self.num_prompts,
            "num_prompt_tokens": len(self.prompt_tokens),
            "num_generated_tokens": len(self.generated),
            "kl_support": self.kl_support,
            "thresholds": asdict(self.thresholds),
            "checks": [asdict(check) for check in self.checks],
            "rank_histogram": self.rank_histogram,
            "worst": [
                asdict(token) | {"logprob_diff": token.logprob_diff}
                for token in self.worst
            ],
        }
        return json.dumps(
            _finite(report), indent=2, ensure_ascii=False, allow_nan=False
        )

    def write_json(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def print_table(self) -> None:
        """Print the report to standard output."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> Group:
        # Imported here: serving does not need them.
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        verdict = (
            Text("PASSED", "bold green") if self.passed else Text("FAILED", "bold red")
        )
        title = Text.assemble(
            "Served against reference: ",
            verdict,
            f"\n{self.num_prompts} prompts of {len(self.prompt_tokens)} tokens, "
            f"{len(self.generated)} tokens generated",
        )
        summary = Table(title=title)
        summary.add_column("check")
        summary.add_column("value", justify="right")
        summary.add_column("limit", justify="right")
        summary.add_column("")
        for check in self.checks:
            mark = Text("ok", "green") if check.passed else Text("fail", "bold red")
            value = (
                f"{check.value:.3g}" if check.relation == "≤" else f"{check.value:.6g}"
            )
            summary.add_row(
                check.name, value, f"{check.relation} {check.limit:g}", mark
            )
        ranks = [f"{rank} for {n}" for rank, n in self.rank_histogram.items()]
        if len(ranks) > LISTED:
            ranks = [*ranks[: LISTED - 1], "...", ranks[-1]]
        parts: list[Any] = [
            summary,
            Text(f"Rank in the reference's order: {', '.join(ranks)} tokens"),
            Text(f"KL(served || reference) over {self.kl_support}, in nats"),
        ]
        if not self.passed:
            worst = Table(title="Worst tokens")
            for name in ("prompt", "position", "token", "text"):
                worst.add_column(name)
            for name in ("log p served", "log p reference", "rank"):
                worst.add_column(name, justify="right")
            for token in self.worst:
                worst.add_row(
                    str(token.prompt),
                    f"{token.position}" + ("" if token.generated else " (prompt)"),
                    str(token.token_id),
                    Text(repr(token.text)),
                    f"{token.served_logprob:.6f}",
                    f"{token.reference_logprob:.6f}",
                    str(token.rank),
                )
            parts.append(worst)
        return Group(*parts)


def _within(of: str, tokens: list[TokenComparison], limits: Thresholds) -> list[Check]:
    """The checks of |Δ log p|, no finer than what float32 resolves of such values."""
    diffs = [token.logprob_diff for token in tokens]
    values = (token.reference_logprob for token in tokens)
    sizes = [abs(value) for value in values if math.isfinite(value)]
    largest, usual = (RESOLUTION * size(sizes or [0.0]) for size in (_max, _mean))
    most, mean = limits.max_logprob_diff, limits.mean_logprob_diff
    return [
        # A limit of zero asks for equal bits.
        _at_most(f"{of}max |Δ log p|", _max(diffs), max(most, largest) if most else 0),
        _at_most(f"{of}mean |Δ log p|", _mean(diffs), max(mean, usual) if mean else 0),
    ]


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, value, "≤", limit, value <= limit)  # never true of a NaN


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _max(values: Sequence[float]) -> float:
    """The largest value; NaN if there is one, or no value."""
    if not values or any(map(math.isnan, values)):
        return math.nan
    return max(values)


def _finite(value: Any) -> Any:
    """`value` with each float that JSON cannot write replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
