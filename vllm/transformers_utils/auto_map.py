# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The model that a directory's own code defines, named by `auto_map` in its config."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Container, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.parallel_context import ParallelContext

# Names a class or factory for vLLM alone; Transformers does not read it.
VLLM_KEY = "VllmModel"

# Begins the names of packages that are directories with a model's code.
_PREFIX = "model_code_"


class AutoMapModel:
    """A factory of the model that `reference` names, as `file.name`.

    A class is called with the config, as Transformers does; anything else as
    `factory(vllm_config, parallel_context)`. The code is loaded where it is needed,
    and not pickled.
    """

    def __init__(self, reference: str, model_config: ModelConfig) -> None:
        self.reference = reference
        self.model = model_config.model
        self.revision = model_config.revision
        self.code_revision = model_config.code_revision

    def load(self) -> Any:
        """The class or factory itself. Runs the directory's code."""
        try:
            return get_class_from_dynamic_module(
                self.reference,
                self.model,
                revision=self.revision,
                code_revision=self.code_revision,
            )
        except OSError:
            # Transformers takes `.parts.core` for a file of that name.
            if "--" in self.reference or not os.path.isdir(self.model):
                raise
            return _load_from_package(Path(self.model), self.reference)

    def __call__(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        target = self.load()
        if isinstance(target, type):
            return target(vllm_config.model_config.hf_config)
        return target(vllm_config, parallel_context)


def _load_from_package(directory: Path, reference: str) -> Any:
    """What `reference`, a `file.name`, is in a directory that is taken for a package.

    Its code may import from folders in it, as `from .parts.core import ...`.
    """
    file, _, name = reference.rpartition(".")
    if not (directory / f"{file}.py").is_file():
        raise ValueError(
            f"config.json names {reference} as its model, in auto_map, but there is no "
            f"{file}.py in {directory}. Add the file, or correct auto_map."
        )
    digest = hashlib.sha256(str(directory.resolve()).encode())
    for path in sorted(directory.rglob("*.py")):
        digest.update(path.read_bytes())
    package = f"{_PREFIX}{digest.hexdigest()}"  # edited code: another name
    if package not in sys.modules:
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(directory)]
        sys.modules[package] = module_from_spec(spec)
    return getattr(importlib.import_module(f"{package}.{file}"), name)


class _SourceLoader(SourceFileLoader):
    """Compiles a file each time, and neither reads nor writes bytecode beside it.

    Python takes bytecode for current if the file's size and its time in seconds are
    unchanged, and an edit may keep both. A model's directory may also be read-only.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _DirectoryCodeFinder(MetaPathFinder):
    """Finds the files of a directory that `_load_from_package` took for a package."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _SourceLoader(fullname, spec.loader.path)
        return spec


_FINDER = _DirectoryCodeFinder()


def model_reference(
    auto_map: Mapping[str, str | Sequence[str | None]] | None,
) -> str | None:
    """What `auto_map` names as the model, `VllmModel` before `AutoModel...`.

    Of a list, as tokenizers have, the first that is named.
    """
    named = auto_map or {}
    for key in [VLLM_KEY, *(key for key in named if key.startswith("AutoModel"))]:
        value = named.get(key)
        for reference in [value] if isinstance(value, str) else value or ():
            if reference is not None:
                return reference
    return None


def auto_map_model(
    model_config: ModelConfig, known: Container[str]
) -> AutoMapModel | None:
    """The model of the directory's own code, if that is trusted and names one.

    Unless `auto_map` names it as `VllmModel`, `known` architectures come before it,
    and a Transformers model whose attention can be exchanged is left to vLLM's
    Transformers backend.
    """
    auto_map = getattr(model_config.hf_config, "auto_map", None) or {}
    reference = model_reference(auto_map)
    if reference is None or not model_config.trust_remote_code:
        return None
    model = AutoMapModel(reference, model_config)
    if VLLM_KEY in auto_map:
        # Here, so that an error in the code is raised in the caller's process.
        model.load()
        return model
    if any(arch in known for arch in model_config.hf_config.architectures or ()):
        return None
    target = model.load()
    if isinstance(target, type) and issubclass(target, PreTrainedModel):
        exchangeable = target.is_backend_compatible()
        if exchangeable or target._can_set_attn_implementation():
            return None
    return model
