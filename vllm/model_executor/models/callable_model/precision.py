# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The precision that a module has in training, where an engine would have another.

vLLM builds models under a default dtype of, say, bfloat16, and a rotary embedding's
`torch.arange(0, d, 2) / d` would be rounded with every step of its computation. A
trainer computes it under PyTorch's own default, float32. And a model in float32 would
have its attention in TF32 on a GPU, where PyTorch's products are float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

import vllm.envs as envs

from .parameter_mode import ParameterMode


class Float32Constants(ParameterMode):
    """Has a factory compute in float32, and its parameters in the dtype of the engine.

    Every tensor that is made without a dtype is float32 instead of `dtype`. Those that
    become parameters are cast to `dtype` when a module registers them, one by one, so
    that the whole model is never in float32. A dtype that is asked for is respected,
    also in what is computed from that tensor. `torch.get_default_dtype()` still answers
    `dtype`, which is what vLLM's own layers ask.

    Args:
        dtype: the engine's, and the default while the factory runs.

    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # By storage: a parameter is another tensor than the one it was made of.
        self._asked_for: set[StorageWeakRef] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.get_default_dtype() != self.dtype:  # the factory set one of its own
            result, asked_for = func(*args, **kwargs), True
        else:
            torch.set_default_dtype(torch.float32)
            try:
                result = func(*args, **kwargs)
            finally:
                torch.set_default_dtype(self.dtype)
            given = tree_leaves((args, kwargs))
            asked_for = (
                func is torch.Tensor.float
                or any(value is torch.float32 for value in given)
                or any(map(self._is_asked_for, given))
            )
        in_place = bool(args) and result is args[0] and func is not torch.Tensor.float
        if asked_for and not in_place:
            self._asked_for.update(
                StorageWeakRef(tensor.untyped_storage())
                for tensor in tree_leaves(result)
                if _is_plain_float32(tensor)
            )
        return result

    def _is_asked_for(self, tensor: Any) -> bool:
        return (
            _is_plain_float32(tensor)
            and StorageWeakRef(tensor.untyped_storage()) in self._asked_for
        )

    def registered(self, module: nn.Module, parameter: Any) -> None:
        if _is_plain_float32(parameter) and not self._is_asked_for(parameter):
            # In place, because another module may be about to share it.
            parameter.data = parameter.data.to(self.dtype)

    def computed(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Buffers and attributes of `module` that are float32 though it never asked."""
        return [
            (part, name)
            for part in module.modules()
            for name, value in _tensors(part)
            if _is_plain_float32(value) and not self._is_asked_for(value)
        ]


def keep_float32(dtype: torch.dtype, device: torch.device) -> None:
    """Have Triton multiply float32 as PyTorch does, and not in TF32 with its 11 bits.

    vLLM's attention for float32 on a GPU is a Triton kernel. It is compiled with the
    precision of `TRITON_F32_DEFAULT`, which keeps what a user has set. The exact mode
    is left alone: there engine and trainer compile the same kernels in the same way.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    is_float32 = device.type == "cuda" and dtype == torch.float32
    if is_float32 and exact and not envs.VLLM_BATCH_INVARIANT:
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def is_about_dtypes(error: Exception) -> bool:
    """Whether `error` is what PyTorch raises for operands of two dtypes."""
    return any(word in str(error) for word in ("dtype", "scalar type"))


def round_constants(
    constants: list[tuple[nn.Module, str]], dtype: torch.dtype
) -> list[str]:
    """Cast what `computed` returned to `dtype`; returns the names."""
    for part, name in constants:
        setattr(part, name, getattr(part, name).to(dtype))
    return sorted({f"{type(part).__name__}.{name}" for part, name in constants})


def _tensors(part: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from part.named_buffers(recurse=False)
    yield from vars(part).items()


def _is_plain_float32(value: Any) -> bool:
    plain = type(value) in (torch.Tensor, nn.Parameter)
    return plain and value.dtype == torch.float32
