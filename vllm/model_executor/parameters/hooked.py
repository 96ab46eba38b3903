# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Submodules whose state dict is not simply their tensors by name.

Hooks may split, fuse or rename in `state_dict()`, and undo it in `load_state_dict()`.
Such a submodule is filled by its own `load_state_dict`, with all its tensors at once.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import layout_of

# The suffix that PyTorch gives the name of what `get_extra_state` returns.
EXTRA_STATE = "_extra_state"
# Libraries whose hooks on state dicts are known to keep or undo names as read here.
KNOWN_LIBRARIES = {"torch", "vllm", "megatron", "transformer_engine"}


@dataclass
class Hooked:
    """A submodule that only its own `load_state_dict` can fill, as its hooks rename.

    `local_names` are those of its parameters and buffers in the whole module.
    """

    path: str
    prefix: str  # of its names in a checkpoint
    part: weakref.ref[nn.Module]
    local_names: set[str]
    refusal: str | None = None  # why that cannot be done here

    def get_part(self) -> nn.Module:
        part = self.part()
        assert part is not None, "a submodule was removed from its model"
        return part

    def state_names(self) -> list[str]:
        """The names that its state dict has in a checkpoint."""
        return [self.prefix + name for name in self.get_part().state_dict()]


def find_hooked(
    module: nn.Module,
    state: dict[str, object],
    full_name: Callable[[str, torch.Tensor | None], str],
    context: ParallelContext,
) -> Iterator[Hooked]:
    """The outermost modules whose state dict is not simply their tensors by name."""
    own = {id(tensor) for _, _, _, tensor in tensors_of(module)}
    foreign = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and id(tensor) not in own
    ]
    paths = {path for path, part in module.named_modules() if _loads_itself(part)}
    saving = [path for path, part in module.named_modules() if _saves_itself(part)]
    for name in foreign:
        if name.endswith(EXTRA_STATE):
            continue
        around = [p for p in saving if not p or name.startswith(f"{p}.")]
        paths.add(max(around, key=len, default=""))
    for path in sorted(paths, key=len):
        if any(not p or path.startswith(f"{p}.") for p in paths - {path}):
            continue
        part = module.get_submodule(path)
        names = {
            f"{inner}.{leaf}" if inner else leaf
            for inner, _, leaf, _ in tensors_of(part, path)
        }
        names |= {name for name in state if not path or name.startswith(f"{path}.")}
        prefix = full_name(f"{path}.", None) if path else ""
        refusal = next(_refusals(part, path, context), None)
        yield Hooked(path, prefix, weakref.ref(part), names, refusal)


def _refusals(part: nn.Module, path: str, context: ParallelContext) -> Iterator[str]:
    """Why `load_state_dict` of `part` would not do."""
    for inner, owner, leaf, tensor in tensors_of(part, path):
        layout = layout_of(tensor, owner, context)
        layer = isinstance(getattr(owner, "quant_method", None), QuantizeMethodBase)
        if layer or isinstance(tensor, DTensor) or layout.shape != layout.local_shape:
            yield (
                f"{path or type(part).__name__} has hooks of its own on its state dict,"
                f" which are for whole tensors, but {inner}.{leaf} is divided, or one "
                "of vLLM's layers'. Give the module a load_weights(weights) method."
            )


def _loads_itself(part: nn.Module) -> bool:
    hooks = part._load_state_dict_pre_hooks.values()
    return any(library_of(hook) not in KNOWN_LIBRARIES for hook in hooks) or (
        library_of(type(part)._load_from_state_dict) not in KNOWN_LIBRARIES
    )


def _saves_itself(part: nn.Module) -> bool:
    hooks = part._state_dict_hooks.values()
    methods = (type(part)._save_to_state_dict, type(part).state_dict)
    return any(library_of(code) not in KNOWN_LIBRARIES for code in (*hooks, *methods))


def load_hooked(hooked: Hooked, state: dict[str, Any], kind: str, source: str) -> None:
    """Load by `load_state_dict`, whose hooks rename. A failure changes no tensor."""
    part = hooked.get_part()
    state = {name[len(hooked.prefix) :]: value for name, value in state.items()}
    tied: dict[int, list[str]] = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():  # one name is enough
        given = [name for name in names if name in state]
        for name in names if given and len(names) > 1 else ():
            if hooked.prefix + name in hooked.state_names():
                state.setdefault(name, state[given[0]])
    tensors = [*part.parameters(), *part.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        part.load_state_dict(state)
    except BaseException as error:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)
        if isinstance(error, RuntimeError):
            raise ValueError(
                f"{source} does not fit {hooked.path or kind}, whose state dict has "
                f"hooks of its own: {error}"
            ) from error
        raise


def tensors_of(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """All parameters and persistent buffers, at each place where they lie."""
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        for leaf, tensor in (owner._parameters | owner._buffers).items():
            if tensor is not None and leaf not in owner._non_persistent_buffers_set:
                yield path, owner, leaf, tensor


def is_empty(value: object) -> bool:
    """Whether an extra state holds nothing."""
    if isinstance(value, io.BytesIO):
        return value.getbuffer().nbytes == 0
    return value is None or (isinstance(value, torch.Tensor) and value.numel() == 0)


def library_of(value: object) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]
