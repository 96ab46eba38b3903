# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line: `python -m tools --help`."""

import sys

if sys.version_info < (3, 11):  # it could not read upstream.toml
    sys.exit("error: This Python is too old: use Python 3.11 or newer.")

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

from tools import (
    ROOT,
    BuildError,
    check,
    compose,
    export,
    native,
    one_sentence,
    patches,
    refresh,
    upstream,
    upstream_tests,
)

DESCRIPTION = """\
Builds and maintains the vLLM of this repository: upstream's release, the new modules
in vllm/ and the diffs in patches/. `pip install .` is the usual way to install it.
"""


def _compose(args: argparse.Namespace) -> int:
    upstream.check_python()
    if args.directory.exists():
        raise BuildError(f"{args.directory} exists: name a folder that does not.")
    release = upstream.release(args.version)
    device = args.device or upstream.target_device()
    directory = args.directory.resolve()
    compose.compose(directory, release, device, source=args.source)
    print(f"Composed vLLM {release.version(device)} in {directory}")
    return 0


def _apply(args: argparse.Namespace) -> int:
    written = patches.apply(args.tree.resolve())
    print(f"Applied to {args.tree}: {len(written)} files written")
    return 0


def _revert(args: argparse.Namespace) -> int:
    restored = patches.revert(args.tree.resolve())
    print(f"Reverted in {args.tree}: {len(restored)} files restored or removed")
    return 0


def _develop(args: argparse.Namespace) -> int:
    upstream.check_python()
    if upstream.use_precompiled():  # here, where a progress bar can be seen
        upstream.fetch(upstream.release().wheel(upstream.target_device()))
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation"]
    if not upstream.use_precompiled():
        command.remove("--no-build-isolation")
    status = subprocess.run([*command, *args.pip, "-e", str(ROOT)]).returncode
    if status == 0:  # now there is a torch to compile for
        native.build(compose.DEVELOP)
    return status


def _check(args: argparse.Namespace) -> int:
    return check.main(args.version or upstream.supported())


def _refresh(args: argparse.Namespace) -> int:
    return refresh.main(args.version or upstream.release().upstream)


def _export(args: argparse.Namespace) -> int:
    written = export.export(args.directory.resolve(), args.tree)
    for branch, mails in written.items():
        print(f"{branch}: {len(mails)} commits")
    print(
        f"{len(written)} branches in {args.directory}: `git am --signoff` takes the "
        "files of each on a plain vLLM"
    )
    return 0


def _upstream_tests(args: argparse.Namespace) -> int:
    return upstream_tests.main()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    versions = upstream.supported()

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=f"{summary}. {more}")
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "compose",
        _compose,
        "make a tree of vLLM with this patch set",
        "The tree is an unpacked wheel, which PYTHONPATH can name, or with --source "
        "upstream's source, which its own build can take.",
    )
    sub.add_argument("directory", type=Path, help="the folder to make")
    sub.add_argument("--version", choices=versions, help="upstream's release")
    sub.add_argument("--device", help="cpu or cuda (default: what this machine has)")
    sub.add_argument("--source", action="store_true", help="from upstream's sdist")

    sub = command(
        "apply",
        _apply,
        "lay the new modules and the patches on an unpacked vLLM",
        "All of them fit exactly, or nothing changes. Needs git and no network.",
    )
    tree_help = "the folder that holds vllm/: a site folder, an sdist, a checkout"
    sub.add_argument("tree", type=Path, help=tree_help)

    sub = command(
        "revert",
        _revert,
        "undo `apply`",
        "Every file is again what it was, byte for byte; refuses if one was edited.",
    )
    sub.add_argument("tree", type=Path, help=tree_help)

    sub = command(
        "develop",
        _develop,
        "install for development",
        "Edits in vllm/ of this repository take effect at once; run it again after "
        "adding a module or changing a patch. Undo with `pip uninstall vllm`.",
    )
    sub.add_argument("pip", nargs="*", help="more for pip to install (after `--`)")

    sub = command(
        "check",
        _check,
        "check the patch set against the supported releases",
        "Applies, reverses, compiles, and has every name that our modules use; no "
        "collisions; headers and reachability.",
    )
    sub.add_argument("--version", choices=versions, action="append", help="only these")

    sub = command(
        "refresh",
        _refresh,
        "port the patches to a release",
        "Renews line numbers, and merges what no longer fits; says what it could not.",
    )
    sub.add_argument("--version", choices=versions, help="upstream's release")

    sub = command(
        "export",
        _export,
        "write the change as branches for `git am`",
        "Generic models are one branch; each patch of the robustness series is one.",
    )
    sub.add_argument("directory", type=Path, help="where the branches are written")
    sub.add_argument(
        "--tree",
        type=Path,
        help="a plain vLLM source tree to write it against (default: upstream's sdist)",
    )

    command(
        "upstream-tests",
        _upstream_tests,
        "run upstream's own tests on the patched vLLM",
        "Those that upstream.toml lists; one that passes without the patches only is "
        "an error.",
    )
    return parser


def main() -> int:
    args = _parser().parse_args()
    with one_sentence():
        return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
