# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The first module whose output differs between two runs of one model.

Where log-probabilities should have equal bits and have not, this says which module
made the difference:

    difference = first_difference(llm, model, prompt)
    print(difference or "every output is equal")

Outputs are recorded by forward hooks, under the modules' names, in the order in which
the modules finish. So a module comes after those that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.entrypoints.llm import LLM

__all__ = [
    "OutputDifference",
    "compare_outputs",
    "first_difference",
    "record_outputs",
]

# Names of modules, in the order in which they finished -> the tensors of each output.
# A module that was called again has a number after its name, from 2 on.
Outputs = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class OutputDifference:
    """The first module whose output differs.

    Args:
        name: The module's name, `""` for the whole model. A number after it, as in
            `norm (2)`, is the call.
        shape: Of the output's first tensor that differs.
        differing: The share of its elements that differ, from 0 to 1. NaNs are equal
            to each other.
        max_difference: The largest absolute difference; NaN if one side has a NaN
            where the other has none.
        not_compared: Modules that finished after the last equal one, and whose outputs
            cannot be compared: only one run has them, or a rank has a part of them.

    """

    name: str
    shape: tuple[int, ...]
    differing: float
    max_difference: float
    not_compared: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.name or 'the whole model'} {list(self.shape)}: "
            f"{100 * self.differing:.3g} % of the elements differ, by at most "
            f"{self.max_difference:.3g}"
        )
        if self.not_compared:
            text += f" (before it, not compared: {', '.join(self.not_compared)})"
        return text


@contextmanager
def record_outputs(module: nn.Module) -> Iterator[Outputs]:
    """Record what `module` and its submodules return, for the time of the block.

    The outputs are copied to the CPU, without gradients. Only calls of modules are
    seen: compiled code and CUDA graphs run no hooks.
    """
    outputs: Outputs = {}
    calls: dict[str, int] = {}

    def record(name: str, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        if not tensors:
            return
        calls[name] = calls.get(name, 0) + 1
        key = name if calls[name] == 1 else f"{name} ({calls[name]})"
        # clone: later operators may write into an output
        outputs[key] = [x.detach().to("cpu", copy=True) for x in tensors]

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, output: record(name, output)

    handles = [
        part.register_forward_hook(hook(name)) for name, part in module.named_modules()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def compare_outputs(
    expected: Mapping[str, Sequence[torch.Tensor]],
    actual: Mapping[str, Sequence[torch.Tensor]],
    tolerance: float = 0.0,
) -> OutputDifference | None:
    """The first difference in the order of `actual`, None if there is none.

    Tensors of one dtype and number of elements are compared, whatever their leading
    axes: `[1, tokens, hidden]` is compared with `[tokens, hidden]`.

    Args:
        expected: From `record_outputs`, for the reference.
        actual: The same of the other run.
        tolerance: What elements may be apart, relative to the largest value of the
            tensor in `expected`. 0 asks for equal bits, except that 0.0 equals -0.0.

    Raises:
        ValueError: No output could be compared.

    """
    skipped: list[str] = []
    compared = 0
    for name, tensors in actual.items():
        pairs = _pairs(expected.get(name, ()), tensors)
        if not pairs:
            skipped.append(name)
            continue
        for x, y in pairs:
            difference = _difference(name, x, y, tolerance, tuple(skipped))
            if difference is not None:
                return difference
        compared += 1
        skipped.clear()
    if not compared:
        raise ValueError(
            f"No outputs can be compared: one run recorded {_some(expected)}, the "
            f"other {_some(actual)}. Run both eagerly (enforce_eager=True), on one "
            "prompt."
        )
    return None


def _pairs(
    expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of both sides, in one shape; none if they do not fit."""
    if len(expected) != len(actual):
        return []
    pairs = []
    for x, y in zip(expected, actual, strict=True):
        same_axis = x.shape[-1:] == y.shape[-1:] or x.dim() != y.dim()
        if x.dtype != y.dtype or x.numel() != y.numel() or not same_axis:
            return []
        pairs.append((x.reshape(y.shape), y))
    return pairs


def _difference(
    name: str,
    expected: torch.Tensor,
    actual: torch.Tensor,
    tolerance: float,
    not_compared: tuple[str, ...],
) -> OutputDifference | None:
    if actual.numel() == 0:
        return None
    x, y = (z.double() for z in (expected, actual))
    # inf - inf is NaN, so equal elements are left out before
    apart = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0)
    limit = tolerance * float(x.abs().nan_to_num(posinf=0.0).max())
    differs = ~(apart <= limit)  # also true of NaN
    if not differs.any():
        return None
    return OutputDifference(
        name,
        tuple(actual.shape),
        float(differs.double().mean()),
        float(apart.max()),
        not_compared,
    )


def _some(outputs: Mapping[str, Any]) -> str:
    names = list(outputs)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "nothing"


@torch.no_grad()
def first_difference(
    llm: LLM,
    module: nn.Module,
    prompt: list[int],
    forward: Callable[[torch.Tensor], Any] | None = None,
) -> OutputDifference | None:
    """The first module whose output differs between an engine and a trainer.

    Under tensor parallelism the outputs of the first rank are compared, as far as they
    are whole. An output head that the engine calls for the last token only is not.

    Args:
        llm: An engine that runs eagerly (`enforce_eager=True`). If its workers are
            processes of their own, set `VLLM_ALLOW_INSECURE_SERIALIZATION=1`, because
            the functions that record are sent to them.
        module: The trainer's module, which has the names of the engine's.
        prompt: Token ids that fit into one step of the engine.
        forward: Token ids `[seq]` on the module's device -> anything; calls `module`
            on one sequence. Default: `module(token_ids, positions)`.

    Raises:
        ValueError: Nothing was recorded in the engine, or no output could be compared.

    """
    llm.reset_prefix_cache()
    llm.apply_model(_start)
    try:
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        tokens = TokensPrompt(prompt_token_ids=prompt)
        llm.generate([tokens], params, use_tqdm=False)
    finally:
        actual = llm.apply_model(_stop)[0]
    device = next(module.parameters()).device
    token_ids = torch.tensor(prompt, device=device)
    with record_outputs(module) as expected:
        if forward is None:
            module(token_ids, torch.arange(len(prompt), device=device))
        else:
            forward(token_ids)
    return compare_outputs(expected, actual)


_RECORDING = "recording_of_outputs"


def _start(model: nn.Module) -> None:
    recording = record_outputs(model)
    model.__dict__[_RECORDING] = (recording, recording.__enter__())


def _stop(model: nn.Module) -> Outputs:
    recording, outputs = model.__dict__.pop(_RECORDING)
    recording.__exit__(None, None, None)
    return outputs
