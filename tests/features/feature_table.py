# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs vLLM's features with one model in every form, beside vLLM's own class.

    python tests/features/feature_table.py [--engine NAME] [--columns PATTERN]
        [--dtype bfloat16] [--graphs] [--json RESULTS]

Prints a table: «equal» where tokens are those of vLLM's class and log-probabilities
differ by at most 1e-4, else what differs or the refusal. `--json` keeps the outcomes in
a file, and adds to those of other engines and columns that it has. On a GPU, `--graphs`
compiles and captures CUDA graphs.

    python tests/features/feature_table.py --print RESULTS

prints the table of kept outcomes, which docs/models/features.md has.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before vllm is imported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # no rounding to TF32

import torch  # noqa: E402
from feature_models import (  # noqa: E402
    COLUMNS,
    LENGTH,
    NATIVE,
    NATIVE_DIVIDED,
    Column,
    native_of,
    save,
    save_adapter,
)
from feature_rows import (  # noqa: E402
    ENGINES,
    FEATURES,
    FOLDER,
    Feature,
    Result,
    Subject,
)

import vllm  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

# Of log-probabilities, by dtype.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
TIMEOUT_S = 900


def run_engine(
    column: Column, engine: str, dtype: str = "float32", graphs: bool = False
) -> dict[str, Result]:
    """Each feature of `engine`, by name; `{"refused": ...}` where it is."""
    features = [feature for feature in FEATURES if feature.engine == engine]
    setup = ENGINES[engine]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        save(folder, column, setup.family, dtype)
        save(folder / "other", column, setup.family, dtype, seed=1)
        if setup.family == "llama":
            for seed in range(2):
                save_adapter(folder / "adapters" / str(seed), column, seed)
        options = with_folder({**setup.options, **column.options}, str(folder))
        llm = None
        try:
            llm = LLM(
                str(folder),
                dtype=dtype,
                max_model_len=LENGTH,
                max_num_batched_tokens=48,  # so that a prompt is read in chunks
                max_num_seqs=4,
                enforce_eager=not graphs,
                kv_cache_memory_bytes=1 << 24,
                disable_log_stats=True,
                **options,
            )
            subject = Subject(llm, folder)
            return {feature.name: attempt(feature, subject) for feature in features}
        except Exception as error:  # noqa: BLE001 - the refusal is the result
            return {feature.name: refusal(error) for feature in features}
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown(timeout=30)
            cleanup_dist_env_and_memory()


def with_folder(value: Any, folder: str) -> Any:
    """`value` with the model's directory in the place of FOLDER."""
    if isinstance(value, dict):
        return {key: with_folder(entry, folder) for key, entry in value.items()}
    return value.replace(FOLDER, folder) if isinstance(value, str) else value


def run_apart(
    column: Column, engine: str, dtype: str = "float32", graphs: bool = False
) -> dict[str, Result]:
    """As `run_engine`, in a process of its own.

    vLLM's CPU platform cannot start a second engine in a process that has speculated.
    """
    command = [sys.executable, __file__, "--engine", engine, "--run", column.title]
    command += ["--dtype", dtype, *["--graphs"] * graphs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{column.title}, {engine}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def attempt(feature: Feature, subject: Subject) -> Result:
    try:
        return feature.run(subject)
    except Exception as error:  # noqa: BLE001 - as above
        return refusal(error)


def refusal(error: Exception) -> dict[str, str]:
    """Its type and its message, without what pydantic writes around one."""
    text = " ".join(str(error).split())
    if inner := re.search(r"Value error, (.+?) \[type=", text):
        text = inner[1]
    return {"refused": f"{type(error).__name__}: {text}"[:300]}


def refused(result: Result) -> str | None:
    """Why, or None."""
    return result.get("refused") if isinstance(result, dict) else None


def difference(
    wanted: Result, got: Result, where: str = "", tolerance: float = 1e-4
) -> str | None:
    """The first place where they differ; numbers may by `tolerance`."""
    if isinstance(wanted, float) and isinstance(got, float):
        near = abs(wanted - got) <= tolerance or wanted == got  # both infinite
        return None if near else f"{where}: {wanted} is {got}"
    if isinstance(wanted, dict) and isinstance(got, dict):
        if wanted.keys() != got.keys():
            return f"{where}: {list(wanted)} is {refused(got) or list(got)}"
        pairs = [(wanted[key], got[key], f"{where}.{key}") for key in wanted]
    elif isinstance(wanted, list | tuple) and isinstance(got, list | tuple):
        if len(wanted) != len(got):
            return f"{where}: {wanted} is {got}"
        pairs = [
            (a, b, f"{where}[{i}]")
            for i, (a, b) in enumerate(zip(wanted, got, strict=True))
        ]
    else:
        return None if wanted == got else f"{where}: {wanted} is {got}"
    found = (difference(a, b, place, tolerance) for a, b, place in pairs)
    return next(filter(None, found), None)


def cell(wanted: Result, got: Result, tolerance: float) -> str:
    """What the table says of one feature in one form."""
    why = refused(got)
    if why is not None:
        return "refused, too" if refused(wanted) is not None else f"refused: {why}"
    differs = difference(wanted, got, tolerance=tolerance)
    return "equal" if differs is None else f"differs: {differs[:100]}"


def outcomes(
    engine: str, columns: list[Column], dtype: str, graphs: bool
) -> dict[str, dict[str, str]]:
    """Of each feature of `engine`, by column; vLLM's own class has one, too."""

    @functools.cache
    def wanted_by(column: Column) -> dict[str, Result]:
        return run_apart(column, engine, dtype, graphs)

    found = {}
    for name, value in wanted_by(NATIVE).items():
        why = refused(value)
        found[name] = {NATIVE.title: "runs" if why is None else f"refused: {why}"}
    for column in columns:
        if ENGINES[engine].family not in column.families:
            for cells in found.values():
                cells[column.title] = "–"
            continue
        got = run_apart(column, engine, dtype, graphs)
        for name, value in wanted_by(native_of(column)).items():
            text = cell(value, got[name], TOLERANCES[dtype])
            found[name][column.title] = text
    return found


def table(rows: dict[str, dict[str, str]], titles: list[str]) -> str:
    """Markdown: every row and column there is, also those that were not run."""
    lines = ["| " + " | ".join(["Feature", *titles]) + " |"]
    lines.append("| --- |" + " --- |" * len(titles))
    for feature in FEATURES:
        cells = rows.get(feature.name, {})
        texts = [cells.get(title, "not run") for title in titles]
        lines.append("| " + " | ".join([feature.name, *texts]) + " |")
    return "\n".join(lines)


def kept(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text())["outcomes"] if path.exists() else {}


def keep(path: Path, rows: dict[str, dict[str, str]], how: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {
        "date": date.today().isoformat(),
        "device": device,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
        **how,
    }
    path.write_text(json.dumps({**about, "outcomes": rows}, indent=1) + "\n")


def titles_of(columns: list[Column]) -> list[str]:
    return [column.title for column in (NATIVE, *columns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="only what runs in this one")
    parser.add_argument("--columns", default="", help="pattern of their titles")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--graphs", action="store_true", help="compile, with graphs")
    parser.add_argument("--json", type=Path, help="keep the outcomes in this file")
    parser.add_argument("--print", type=Path, help="print what was kept, run nothing")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.print is not None:
        print(table(kept(args.print), titles_of(COLUMNS)))
        return
    how = {"dtype": args.dtype, "graphs": args.graphs}
    if args.run is not None:
        known = (NATIVE, NATIVE_DIVIDED, *COLUMNS)
        (column,) = (c for c in known if c.title == args.run)
        print(json.dumps(run_engine(column, args.engine, **how)), flush=True)
        return
    columns = [c for c in COLUMNS if re.search(args.columns, c.title)]
    rows = kept(args.json) if args.json else {}
    for engine in ENGINES if args.engine is None else [args.engine]:
        for name, cells in outcomes(engine, columns, **how).items():
            print(f"{engine}: {name}: {cells}", file=sys.stderr, flush=True)
            rows[name] = rows.get(name, {}) | cells
        if args.json:
            keep(args.json, rows, how)
    print(table(rows, titles_of(columns)))


if __name__ == "__main__":
    main()
