# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forward hooks that add the adapters' outputs to those of a module's layers.

No parameter gets another name, class or value: the layers stay what they are, and their
weights load and update by name while adapters are live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.communication_op import tensor_model_parallel_copy

from .ops.grouped_product import scaled
from .sites import Site


@dataclass
class BatchRows:
    """Which adapter each row of the batch that runs has; all hooks share one.

    Args:
        slots: the slot of each row's adapter, `[at least tokens]`; -1 is none.
        host: the same on the CPU, if the process knows it without asking the device.
        tokens: how many rows the batch has.
        only: the slot of all rows, while a mixture runs with those of one adapter.
        any_adapter: bool `[]` on the CPU, whether some row has one.

    """

    slots: torch.Tensor | None = None
    host: torch.Tensor | None = None
    tokens: int = 0
    only: int | None = None
    any_adapter: torch.Tensor = field(default_factory=lambda: torch.tensor(True))


@dataclass
class Slots:
    """The adapters of one site, in slots.

    Args:
        a: `[ranks, local inputs]` for each slot; in an engine a stack of all. Of a
            stack of experts, `ranks` are those of all experts.
        b: `[ranks, local outputs]` for each slot; in an engine a stack of all.
        ranks: int32 `[slots]`, how many are in use.
        scales: float32 `[slots]`.

    """

    a: list[torch.Tensor] | torch.Tensor = field(default_factory=list)
    b: list[torch.Tensor] | torch.Tensor = field(default_factory=list)
    ranks: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    scales: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


class SiteHook:
    """Adds the adapters' outputs to what one layer returns.

    Args:
        site: the layer.
        rows: which row has which adapter.

    """

    def __init__(self, site: Site, rows: BatchRows) -> None:
        self.site = site
        self.rows = rows
        self.slots = Slots()
        self._handle: Any = None

    def attach(self) -> None:
        if self.site.experts:
            return  # the block of these experts asks for `changed_stack`
        module = self.site.module
        quant_method = getattr(module, "quant_method", None)
        if self.site.is_head and type(module).__name__ == "ParallelLMHead":
            # vLLM's LogitsProcessor does not call the head, but its method.
            method = _HeadMethod(quant_method, self)
            module.quant_method = method  # type: ignore[assignment]
            return
        self._handle = module.register_forward_hook(self._after_forward)

    def detach(self) -> None:
        method = getattr(self.site.module, "quant_method", None)
        if isinstance(method, _HeadMethod):
            self.site.module.quant_method = method.method
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        # Compiled code runs with other batches later, so it cannot ask what this has.
        if not _is_traced() and not self.rows.any_adapter:
            return output
        first = args[0]
        if isinstance(output, tuple):  # vLLM's and Megatron's return their bias too
            if output[0] is None:
                return output
            return self.add(first, output[0]), *output[1:]
        return self.add(first, output)

    def changed_stack(self, slot: int) -> torch.Tensor | None:
        """A stack of experts with an adapter's products added to it.

        Returns:
            In the shape of the parameter, or None if the adapter has no factors for it.

        """
        site, slots = self.site, self.slots
        size = int(slots.ranks[slot]) if slot >= 0 else 0
        if size == 0:
            return None
        # [experts, rank, inputs] and [experts, rank, outputs], of PEFT's two orders
        a = slots.a[slot][:size].view(site.experts, -1, site.local_inputs)
        b = (
            slots.b[slot][:size]
            .view(-1, site.experts, site.local_outputs)
            .transpose(0, 1)
        )
        weight = site.module.get_parameter(site.own_name)
        left, right = (a, b) if site.is_transposed else (b, a)
        left = left.mT.to(weight.dtype) * slots.scales[slot].to(weight.dtype)
        return torch.baddbmm(weight, left, right.to(weight.dtype))

    def add(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output` `[..., outputs]` of input `x`, and the adapters' part of it."""
        if isinstance(x, DTensor):
            x = x.to_local()
        if isinstance(output, DTensor):
            local = self.add(x, output.to_local())
            return DTensor.from_local(local, output.device_mesh, output.placements)
        width = output.shape[-1]
        flat = x.reshape(-1) if self.site.is_embedding else x.reshape(-1, x.shape[-1])
        rows = self._rows_of(flat)
        slots = self.slots
        if self._adds_in_place(flat, output):
            torch.ops.vllm.lora_add(
                output.view(-1, width),
                flat,
                rows,
                slots.a,
                slots.b,
                slots.ranks,
                slots.scales,
                self.rows.any_adapter,
            )
            return output
        host = self.rows.host
        groups = rows if host is None else host[: len(rows)]
        if host is not None and self.rows.only is not None:
            groups = host.new_full((len(rows),), self.rows.only)
        narrow = self._shrink(flat, rows, groups, output.dtype)
        delta = self._expand(narrow, groups, width)
        return output + delta.view(output.shape)

    def _adds_in_place(self, flat: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether `lora_add` does all of it: in an engine, if no sum is over ranks."""
        site = self.site
        return (
            isinstance(self.slots.a, torch.Tensor)
            and not torch.is_grad_enabled()
            and not site.is_embedding
            and output.is_contiguous()
            and flat.shape[-1] == site.inputs == site.local_inputs
            and output.shape[-1] == site.local_outputs
        )

    def _rows_of(self, flat: torch.Tensor) -> torch.Tensor:
        """The slots of the rows of `flat`, `[tokens]` or `[tokens, inputs]`.

        Raises:
            RuntimeError: it has fewer rows than the batch, so that whose they are is
                not known.

        """
        tokens = flat.shape[0]
        assert self.rows.slots is not None
        if self.rows.only is not None:
            return self.rows.slots.new_full((tokens,), self.rows.only)
        if not _is_traced() and tokens < self.rows.tokens:
            raise RuntimeError(
                f"{self.site.name} was called with {tokens} rows in a batch of "
                f"{self.rows.tokens} tokens; an adapter can change only layers that "
                "get every token. Leave it out by target_modules."
            )
        return self.rows.slots[:tokens]

    def _shrink(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        groups: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A x, times the scale; summed over the ranks that divide the inputs."""
        slots, site = self.slots, self.site
        divided = site.local_inputs < site.inputs
        if site.is_embedding:
            narrow = self._look_up(x, rows, dtype, divided)
        else:
            divided &= x.shape[-1] == site.local_inputs
            narrow = torch.ops.vllm.lora_grouped_product(
                x, groups, _as_list(slots.a), slots.ranks, True
            )
        if divided:
            narrow = tensor_model_parallel_all_reduce(narrow.contiguous())
        return scaled(narrow, rows, slots.scales, dtype)

    def _look_up(
        self, ids: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype, divided: bool
    ) -> torch.Tensor:
        """The columns of A for token `ids`: `[tokens]` -> `[tokens, most ranks]`."""
        start = 0
        if divided:
            boxes = self.site.layout.boxes
            start = boxes[0].whole[0] if boxes else 0
        local = ids - start
        size = self.slots.a[0].shape[1]
        known = (local >= 0) & (local < size)
        local = local.where(known, 0)
        most = max(a.shape[0] for a in self.slots.a)
        narrow = torch.zeros(ids.shape[0], most, dtype=dtype, device=ids.device)
        for slot, a in enumerate(self.slots.a):
            mine = ((rows == slot) & known).unsqueeze(1)
            columns = nn.functional.pad(a[:, local].t(), (0, most - a.shape[0]))
            narrow = torch.where(mine, columns.to(dtype), narrow)
        return narrow

    def _expand(
        self, narrow: torch.Tensor, groups: torch.Tensor, width: int
    ) -> torch.Tensor:
        """B of `narrow`, of this rank's outputs or, if the layer gathers, of all."""
        slots, site = self.slots, self.site
        if site.local_outputs < site.outputs:
            narrow = tensor_model_parallel_copy(narrow)
        delta = torch.ops.vllm.lora_grouped_product(
            narrow, groups, _as_list(slots.b), slots.ranks, False
        )
        if width > site.local_outputs:
            delta = tensor_model_parallel_all_gather(delta)[:, :width]
        return delta


def _is_traced() -> bool:
    """Whether code is made of this call, by Dynamo or by `make_fx`."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def _as_list(factors: list[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
    return [factors] if isinstance(factors, torch.Tensor) else factors


class _HeadMethod:
    """vLLM's quantization method of a `ParallelLMHead`, with the adapters added."""

    def __init__(self, method: Any, hook: SiteHook) -> None:
        self.method = method
        self.hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.hook._after_forward(layer, (x,), self.method.apply(layer, x, bias))
