# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A factory's parameters without memory, as their values come from a checkpoint.

A rank of several then never holds the whole model, and initial values cost nothing.
Everything else that the factory computes is computed for real.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .parameter_mode import ParameterMode

# What makes a tensor of its arguments alone, on a device that may be named.
CONSTRUCTORS = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.logspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
}
# Where nn.Module keeps what is looked at by itself.
TABLES = ("_parameters", "_buffers", "_modules")
# What takes values out of a tensor.
PULLS = {
    torch.Tensor.__bool__,
    torch.Tensor.__contains__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__int__,
    torch.Tensor.item,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.allclose,
    torch.equal,
    torch.Tensor.allclose,
    torch.Tensor.equal,
}


class NeedsValuesError(Exception):
    """What a factory computes needs values of parameters; the message says what."""


def needs_values(error: BaseException) -> bool:
    """Whether a factory failed because parameters had no values.

    PyTorch says of what it cannot do without values that a tensor is on "meta".
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NeedsValuesError) or "meta" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class EmptyParameters(ParameterMode):
    """Moves each parameter to the meta device once a module of the factory has it.

    Where the factory itself builds on the meta device, tensors are made on the real
    one, so that what is no parameter has values.

    Only floating-point parameters that the factory makes itself are moved, and none of
    vLLM's layers, whose parameters are this rank's part already.

    Args:
        device: Where the factory computes what is no parameter.

    Raises:
        NeedsValuesError: In the factory: something depends on a parameter's values.

    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.moved = 0
        self._device = device
        # By storage, because a parameter is another tensor than the one it is made of.
        self._made: set[StorageWeakRef] = set()
        self._random: set[StorageWeakRef] = set()
        self._without_values: set[StorageWeakRef] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in CONSTRUCTORS:
            device = kwargs.get("device")
            if device is None:
                device = torch.get_default_device()
            if torch.device(device).type == "meta":
                kwargs["device"] = self._device
        given = _tensors((args, kwargs))
        empty = [tensor for tensor in given if tensor.is_meta]
        if empty and kwargs.get("generator") is not None:
            raise NeedsValuesError(
                "initial values are drawn from a generator of its own"
            )
        drawn_before = self._random_state()
        result = func(*args, **kwargs)
        drawn = not torch.equal(drawn_before, self._random_state())
        random = drawn or any(map(self._is_random, given))
        if random and func in PULLS:
            raise NeedsValuesError("random numbers decide what is built")
        results = _tensors(result)
        if empty and func is torch.Tensor.__setitem__:
            results = given[:1]
        if empty and any(not tensor.is_meta for tensor in results):
            raise NeedsValuesError(
                f"{getattr(func, '__name__', func)} computes with a parameter's values"
            )
        before = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        for tensor in results:
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                continue
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in before:
                self._made.add(storage)
            if tensor.is_meta:
                self._without_values.add(storage)
            elif random:
                self._random.add(storage)
        return result

    def problem(self, module: nn.Module) -> str | None:
        """Why `module` cannot have its parameters without memory; None if it can."""
        if not self.moved:
            return None
        if hasattr(module, "load_weights"):
            return "it has a load_weights of its own, which may keep initial values"
        parameters = dict(module.named_parameters())
        storages: dict[StorageWeakRef, str] = {}
        for name, parameter in parameters.items():
            if type(parameter) is not nn.Parameter:
                if parameter.is_meta:
                    return f"{name} is a {type(parameter).__name__}"
                continue
            storage = StorageWeakRef(parameter.untyped_storage())
            if parameter.is_meta and storage in storages:
                return f"{name} and {storages[storage]} share their memory"
            storages[storage] = name
        own = {id(parameter) for parameter in parameters.values()}
        for path, part in module.named_modules():
            for name, value in (*part._buffers.items(), *vars(part).items()):
                if name in TABLES:
                    continue
                for tensor in _tensors(value):
                    if tensor.is_meta and id(tensor) not in own:
                        where = f"{path}.{name}" if path else name
                        return f"{where} is computed from a parameter"
        kept = {
            StorageWeakRef(buffer.untyped_storage())
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and name not in part._non_persistent_buffers_set
            if type(buffer) is torch.Tensor
        }
        if self._alive(self._random - kept - storages.keys()):
            return "it holds random numbers that are in no checkpoint"
        if self._alive(self._without_values - storages.keys()):
            return "it holds what is computed from a parameter"
        return None

    def registered(self, module: nn.Module, parameter: Any) -> None:
        if (
            type(parameter) is not nn.Parameter
            or not parameter.is_floating_point()
            or parameter.is_meta
            or type(module).__module__.startswith("vllm.")
        ):
            return
        storage = parameter.untyped_storage()
        if StorageWeakRef(storage) not in self._made:
            return  # the caller's, or read from a file
        if storage.nbytes() != parameter.numel() * parameter.element_size():
            return  # a part of a tensor that others may share
        # By PyTorch's function, so that other modes see that it is of the parameter.
        empty = nn.Parameter(
            torch.empty_like(parameter, device="meta"), parameter.requires_grad
        )
        empty.__dict__.update(parameter.__dict__)
        try:
            # In place: tied tensors stay tied, and who refers to one keeps it.
            torch.utils.swap_tensors(parameter, empty)
        except RuntimeError:
            return  # a weak reference to it is kept
        self.moved += 1

    def _random_state(self) -> torch.Tensor:
        state = torch.get_rng_state()
        if self._device.type == "cuda":
            state = torch.cat([state, torch.cuda.get_rng_state(self._device)])
        return state

    def _is_random(self, tensor: torch.Tensor) -> bool:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta:
            return False
        return StorageWeakRef(tensor.untyped_storage()) in self._random

    @staticmethod
    def _alive(storages: Iterable[StorageWeakRef]) -> bool:
        alive = [storage for storage in storages if not storage.expired()]
        if alive:
            gc.collect()  # of what refers to itself
        return any(not storage.expired() for storage in alive)


@contextmanager
def any_values(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Values for `parameters` that have none yet, while a module is tried.

    They are the same on every rank, and differ within a tensor as trained ones do. NaN
    is there again afterwards, to be noticed if nothing is loaded.
    """
    filled = [p for p in parameters if p.is_floating_point() and not p.is_meta]
    generator = torch.Generator("cpu").manual_seed(0)
    # Repeated, because drawing a large model takes long; a prime divides no width.
    numbers = torch.randn(65537, generator=generator, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for parameter in filled:
            width = parameter.shape[-1] if parameter.dim() > 1 else 4
            some = (numbers / max(width, 1) ** 0.5).to(parameter)
            flat = parameter.view(-1)
            whole = flat.numel() // len(some) * len(some)
            flat[:whole].view(-1, len(some)).copy_(some)
            flat[whole:].copy_(some[: flat.numel() - whole])
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in filled:
                parameter.fill_(float("nan"))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
