# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""YAML files of ChatLearn's form: `includes`, sections, and `${name:default}`.

Only plain YAML is read; no tag makes an object.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

Keys = dict[str, Any]

_VARIABLE = re.compile(r"\$\{(\w+)(?::([^}]*))?\}")


def read(path: Path, model: str) -> tuple[Keys, Keys]:
    """A model's keys: those of its own file, and those of the files that it includes.

    Args:
        path: The model's file, or an rlhf.yaml, whose section `model` names the file as
            `model_config_file`. Other keys of the section are the model's own, too.
        model: The section of an rlhf.yaml.

    Raises:
        ValueError: a file includes itself, is no mapping, or needs a variable that is
            not set.

    """
    keys = _load(path)
    sections = keys.get("models") or keys
    section = sections.get(model) if isinstance(sections, dict) else None
    if not isinstance(section, dict):
        if "models" in keys:
            raise ValueError(
                f"{path} has no section {model!r}; it has {', '.join(sections)}."
            )
        return _with_includes(path, keys, ())
    section = dict(section)
    file = section.pop("model_config_file", None)
    if file is None:
        return _with_includes(path, section, ())
    target = path.parent / file
    own, included = _with_includes(target, _load(target), ())
    return own | section, included


def _with_includes(
    path: Path, keys: Keys, including: tuple[Path, ...]
) -> tuple[Keys, Keys]:
    """A file's own keys and those of its includes; a later include wins."""
    here = path.resolve()
    if here in including:
        chain = " → ".join(each.name for each in (*including, here))
        raise ValueError(f"YAML files include each other in a circle: {chain}.")
    own = dict(keys)
    names = own.pop("includes", None) or []
    included: Keys = {}
    for name in [names] if isinstance(names, str) else names:
        file = path.parent / name
        its_own, its_included = _with_includes(file, _load(file), (*including, here))
        included |= its_included | its_own
    return own, included


def _load(path: Path) -> Keys:
    text = path.read_text(encoding="utf-8")
    keys = yaml.safe_load(_VARIABLE.sub(lambda found: _variable(found, path), text))
    if keys is None:
        return {}
    if not isinstance(keys, dict):
        raise ValueError(f"{path} holds a {type(keys).__name__}; expected keys.")
    return {key: None if value == "None" else value for key, value in keys.items()}


def _variable(found: re.Match[str], path: Path) -> str:
    """The environment's value of `${name:default}`, or the default."""
    name, default = found.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise ValueError(f"{path} needs the environment variable {name}; set it.")
    return value
