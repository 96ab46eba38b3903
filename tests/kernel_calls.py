# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How often a trainer's module attends by the training kernel."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class KernelCalls(TorchDispatchMode):
    """Counts the calls of the training kernel of a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.forwards += str(func) == "vllm.packed_attention_cpu.default"
        return func(*args, **(kwargs or {}))
