# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether examples/rl learns with every seed: shares of right answers, and the time.

python benchmarks/rl_seeds.py
python benchmarks/rl_seeds.py --seeds 3 4    # adds to the results of the others
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import host

PROGRAM = Path(__file__).parents[1] / "examples" / "rl" / "grpo.py"
RESULTS = Path(__file__).parent / "results" / "rl-seeds-cpu.json"


def run(seed: int) -> dict[str, Any]:
    """One whole run: shares before and after, steps, tokens, and seconds.

    Raises:
        subprocess.CalledProcessError: the run failed.

    """
    with tempfile.TemporaryDirectory() as directory:
        start, used = time.monotonic(), _cpu_seconds()
        command = [sys.executable, str(PROGRAM), f"--seed={seed}"]
        subprocess.run([*command, f"--output-dir={directory}"], check=True)
        seconds, cpu_seconds = time.monotonic() - start, _cpu_seconds() - used
        result = json.loads((Path(directory) / "result.json").read_text())
        lines = (Path(directory) / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return result | {
        "steps": len(steps),
        "sampled_tokens": round(sum(s["tokens/s"] * s["rollout [s]"] for s in steps)),
        "max_difference": max(s["max |Δ log p|"] for s in steps),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def _cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    known = json.loads(args.results.read_text()) if args.results.exists() else {}
    seeds = known.get("seeds", {})
    for seed in args.seeds:
        seeds[str(seed)] = run(seed)
        print(f"seed {seed}: {seeds[str(seed)]}", flush=True)
        # after each, so that an interrupted call keeps what it has
        text = json.dumps({"host": host(), "seeds": seeds}, indent=1)
        args.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
