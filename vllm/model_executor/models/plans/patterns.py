# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plans of a module, and the names that their patterns match.

`tp_plan`, `pp_plan` and `_no_split_modules` have Hugging Face's form. Unlike there, a
pattern is a fully qualified name, at any depth, of a module or a parameter, in which
`*` stands for any one part, as of a layer in a stack.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# Containers whose children are the layers of a stack, in order.
STACKS = (nn.ModuleList, nn.ModuleDict)

# Transformers adds it to the plan of a config with tied embeddings.
TIED_EMBEDDING = {"embed_tokens": "embedding_rowwise"}


def find_plan(
    module: nn.Module, name: str, hf_config: Any, divides: bool
) -> dict[str, Any]:
    """The module's plan of that name, with those of its submodules merged into it.

    Args:
        module: What a factory built.
        name: `tp_plan` or `pp_plan`.
        hf_config: The model's config, whose plan counts if the module has none.
        divides: Whether the plan divides the module in this layout. If not, the
            entries that Transformers' classes have, and not the user, are left out.

    Raises:
        ValueError: A plan is no dictionary, or two plans differ.

    """
    attributes = (name, f"_{name}")
    on_module = [getattr(module, attribute, None) for attribute in attributes]
    if {} in on_module and not any(on_module):
        return {}
    defaults: set[str] = set()
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        defaults |= {f"{dot}{pattern}" for pattern in _default_plan(part, name)}
    merged: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for attribute in attributes:
            plan = getattr(part, attribute, None) or {}
            if not isinstance(plan, Mapping):
                raise ValueError(
                    f"{kind_of(part)}.{attribute} is a {kind_of(plan)}; expected a "
                    "dictionary with names of modules as keys."
                )
            for pattern, value in plan.items():
                full = f"{dot}{pattern}"
                if full in defaults and not divides:
                    continue
                if merged.setdefault(full, value) != value:
                    raise ValueError(
                        f"{kind_of(module)}: two plans name {full!r}, as "
                        f"{merged[full]!r} and as {value!r}. Leave one of them out."
                    )
    if not merged:
        merged = _plan_of_file(hf_config, name)
    names = names_of(module)
    return {
        pattern: value
        for pattern, value in merged.items()
        # Transformers' plans are for all models of a family, so that some of their
        # patterns name layers that only other models have.
        if pattern not in defaults or matching_names(pattern, names)
    }


def _default_plan(part: nn.Module, name: str) -> dict[str, Any]:
    """The plan that `part` has from the classes of Transformers, or inherits."""
    config_cls = type(getattr(part, "config", None))
    plan = dict(getattr(config_cls, f"base_model_{name}", None) or {})
    if plan and name == "tp_plan":
        plan |= TIED_EMBEDDING
    for cls in type(part).__mro__:
        if cls.__module__.startswith("transformers."):
            return plan | (getattr(cls, f"_{name}", None) or {})
    return plan


def _plan_of_file(hf_config: Any, name: str) -> dict[str, Any]:
    """The plan in `config.json`, unless it is the default of the config's class."""
    plan = dict(getattr(hf_config, f"base_model_{name}", None) or {})
    of_class = getattr(type(hf_config), f"base_model_{name}", None) or {}
    if of_class and plan in (of_class, {**of_class, **TIED_EMBEDDING}):
        return {}
    return plan


def names_of(module: nn.Module) -> list[str]:
    """The names of all submodules and parameters, tied ones by each name."""
    names = [name for name, _ in module.named_modules() if name]
    return names + [n for n, _ in module.named_parameters(remove_duplicate=False)]


def matching_names(pattern: str, names: list[str]) -> list[str]:
    """The names that `pattern` stands for, part by part between the dots.

    A part may have wildcards, as in `layers.*.[qkv]_proj`.
    """
    wanted = pattern.split(".")
    return [
        name
        for name in names
        if len(parts := name.split(".")) == len(wanted)
        and all(map(fnmatchcase, parts, wanted))
    ]


def resolve_pattern(
    module: nn.Module, plan: str, pattern: str, names: list[str]
) -> list[str]:
    """The names that `pattern` stands for.

    Raises:
        ValueError: There are none. The message has the nearest names.

    """
    matches = matching_names(pattern, names)
    if not matches:
        known = sorted({with_wildcards(module, name) for name in names})
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) or known[:3]
        raise ValueError(
            f"{kind_of(module)}: {plan} has {pattern!r}, which matches nothing. The "
            f"nearest names are {', '.join(near)}."
        )
    return matches


def with_wildcards(module: nn.Module, name: str) -> str:
    """`name`, with `*` for a layer of a stack whose layers are all of one class."""
    parts = name.split(".")
    part = module
    for at, child in enumerate(name.split(".")):
        if not isinstance(part, nn.Module) or child not in part._modules:
            break
        kinds = {type(layer) for layer in part.children()}
        if isinstance(part, STACKS) and len(part) > 1 and len(kinds) == 1:
            parts[at] = "*"
        part = part.get_submodule(child)
    return ".".join(parts)


def owners(name: str) -> Iterator[str]:
    """The names of the modules that contain `name`, innermost first; last the empty."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def kind_of(value: object) -> str:
    """The name of an object's class, for messages."""
    return type(value).__name__
