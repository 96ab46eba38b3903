# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""``tink status``: a table of runs, queues and tokens per second."""

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

from vllm_generic.tink.auth import LOCAL_KEY

COLUMNS = ("run", "rank", "step", "loss", "queued", "tok/s", "idle s", "state")


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    metrics = json.loads(run["metrics"] or "{}")
    loss = metrics.get("loss")
    state = "closed" if run["closed"] else "loaded" if run["loaded"] else "stored"
    return (
        run["model_id"],
        str(run["rank"]),
        str(run["step"]),
        "-" if loss is None else f"{loss:.4f}",
        str(run["queued"]),
        f"{run['tokens_per_second']:.0f}",
        f"{run['idle_seconds']:.0f}",
        state,
    )


def format_status(status: dict[str, Any]) -> str:
    rows = [COLUMNS, *(_row(run) for run in status["runs"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    summary = (
        f"{status['base_model']}: {len(status['runs'])} runs, "
        f"{status['sampling_queued']} sampling requests queued, "
        f"up {status['uptime_seconds']:.0f} s"
    )
    lines = [summary]
    for row in rows:
        # the run's name to the left, numbers to the right
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def print_status(url: str) -> int:
    request = urllib.request.Request(f"{url.rstrip('/')}/api/v1/status")
    request.add_header("X-API-Key", os.environ.get("TINKER_API_KEY", LOCAL_KEY))
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            print(format_status(json.load(answer)))
    except urllib.error.HTTPError as error:
        print(f"{url} answered {error.code}: {error.read().decode()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"no service answers at {url}: {error}", file=sys.stderr)
        return 1
    return 0
