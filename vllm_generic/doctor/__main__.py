# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""``python -m vllm_generic.doctor``."""

import os
import sys
from pathlib import Path

# Before vllm is imported: the table is the output.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

DESCRIPTION = """Say what will happen when vLLM serves a model, before an engine starts.

Name a model directory, a factory as module:name, or both. The other options are those
of `vllm serve`; --tensor-parallel-size and --pipeline-parallel-size say which layout is
asked for. The exit code is 1 if anything is refused.
"""


def main() -> int:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm_generic.doctor import Report, examine

    parser = FlexibleArgumentParser(
        prog="python -m vllm_generic.doctor",
        usage="%(prog)s MODEL_DIR|module:factory ... [--self-check] [--json FILE] "
        "[options of vllm serve]",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "examined",
        nargs="+",
        metavar="MODEL_DIR|module:factory",
        help="a directory, a factory, or a directory and its factory",
    )
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="also start an engine, which compares the model with its full forward",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report there, too"
    )
    EngineArgs.add_cli_args(parser)
    arguments = parser.parse_args()
    folders = [text for text in arguments.examined if Path(text).is_dir()]
    names = [text for text in arguments.examined if text not in folders]
    if len(folders) > 1 or len(names) > 1 or any(":" not in name for name in names):
        parser.error(
            f"{', '.join(arguments.examined)}: expected a directory that exists, a "
            "factory as module:name, or one of each"
        )
    # A name of a model would be looked up on a hub.
    arguments.model = folders[0] if folders else "."
    engine = EngineArgs.from_cli_args(arguments)
    defaults = EngineArgs(model=arguments.model)
    options = {
        name: value
        for name, value in vars(engine).items()
        if name != "model" and value != getattr(defaults, name)
    }
    factory = None
    report = Report(" ".join(arguments.examined))
    if names:
        sys.path.insert(0, "")  # as `python -m` has it, also for `python -P`
        try:
            factory = resolve_obj_by_qualname(names[0].replace(":", "."))
        except (ImportError, AttributeError) as error:
            report.add(
                "factory",
                "refused",
                f"{names[0]} cannot be imported: {error}",
                "a name that `python -c 'import module'` finds from this directory",
            )
    if not report.refused:
        folder = folders[0] if folders else None
        report = examine(folder, factory, arguments.self_check, **options)
    report.print_table()
    if arguments.json is not None:
        arguments.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
