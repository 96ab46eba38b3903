# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A mode that also sees each parameter that a factory's modules get."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


class ParameterMode(TorchFunctionMode):
    """Calls `registered` for each parameter that this thread gives to a module."""

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._hook = register_module_parameter_registration_hook(self._on_parameter)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._hook.remove()

    def _on_parameter(self, module: nn.Module, name: str, parameter: Any) -> None:
        if threading.get_ident() == self._thread:  # the hook is the process's
            self.registered(module, parameter)

    def registered(self, module: nn.Module, parameter: Any) -> None:
        """`module` is about to get `parameter`, which may be no parameter yet."""
        raise NotImplementedError
