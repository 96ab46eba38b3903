# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""To which package a piece of code belongs, and which global names it reads."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from itertools import takewhile
from pathlib import Path
from typing import Any

FIXED_PACKAGES = {"numpy", "torch", "vllm"}
LOADS_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
LOADS_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}


def is_fixed(module: str) -> bool:
    """Whether a module belongs to a release: of Python, NumPy, torch or vLLM."""
    package = module.partition(".")[0]
    if package in FIXED_PACKAGES:
        return True
    # A user's module may have the name of one of Python's modules.
    file = _file(package)
    return package in sys.stdlib_module_names and (
        file is None or file.is_relative_to(sysconfig.get_path("stdlib"))
    )


def is_installed(module: str) -> bool:
    """Whether a module comes with an installed package or with Python."""
    file = _file(module)
    parts = file.parts if file is not None else ()
    return is_fixed(module) or "site-packages" in parts or "dist-packages" in parts


def _file(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file else None


def find_by_name(module: str, qualname: str) -> Any:
    """What an importer gets by this name, or None."""
    value: Any = sys.modules.get(module)
    for part in qualname.split("."):
        value = getattr(value, part, None)
    return value


@functools.lru_cache(4096)
def names_read(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The global names that code and the code in it read, with attributes of each.

    `a.b.c` is `("a", "b", "c")`, and what is imported inside a function is
    `("import a.b",)`, or `("import a.b", "c")` for each name that is taken from it.
    """
    names: list[tuple[str, ...]] = []
    instructions = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    for index, instruction in enumerate(instructions):
        following = instructions[index + 1 :]
        if instruction.opname in LOADS_GLOBAL:
            attributes = takewhile(lambda i: i.opname in LOADS_ATTRIBUTE, following)
            names.append((instruction.argval, *(i.argval for i in attributes)))
        elif instruction.opname == "IMPORT_NAME":
            level = instructions[index - 2].argval
            module = f"import {'.' * level}{instruction.argval}"
            rest = takewhile(lambda i: not i.opname.startswith("POP"), following)
            taken = [i.argval for i in rest if i.opname == "IMPORT_FROM"]
            if following and following[0].opname == "IMPORT_FROM":
                names += [(module, name) for name in taken]
            else:
                names.append((module,))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += names_read(constant)
    return tuple(sorted(set(names)))
