# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The linear layers of a plain module, in the form that vLLM quantizes.

A quantization of vLLM's chooses by the name of a layer how it computes, and makes its
parameters. It does so for vLLM's own linear layers, so these take the places of a
plain module's, under the same names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.plans.layers import ColwiseLinear, RowwiseLinear
from vllm.model_executor.models.plans.tensor import PLAIN
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import MARK

logger = init_logger(__name__)

# Forwards of which another layer can do the same.
REPLACEABLE = (*PLAIN, ColwiseLinear.forward)


class OutputOnly(LinearBase):
    """Takes `[..., inputs]` and gives `[..., outputs]`, as `nn.Linear` does.

    Not all kernels for quantized weights take more than two axes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input.flatten(0, -2))  # [tokens, outputs]
        return out.unflatten(0, input.shape[:-1])


class QuantizedLinear(OutputOnly, ReplicatedLinear):
    """In the place of an `nn.Linear`."""


class QuantizedColwiseLinear(OutputOnly, ColumnParallelLinear):
    """In the place of a `ColwiseLinear` of a plan."""


class QuantizedPackedColwiseLinear(OutputOnly, MergedColumnParallelLinear):
    """In the place of a `ColwiseLinear` that has several matrices in one."""


class QuantizedRowwiseLinear(OutputOnly, RowParallelLinear):
    """In the place of a `RowwiseLinear` of a plan."""


def quantizes(module: nn.Module) -> bool:
    """Whether a layer of `module` has a `quant_config`.

    That of an attention layer does not count: it is for the KV cache only.
    """
    return any(
        getattr(part, "quant_config", None) is not None
        for part in module.modules()
        if not isinstance(part, AttentionLayerBase)
    )


def quantize_linears(
    architecture: str,
    module: nn.Module,
    vllm_config: VllmConfig,
    context: ParallelContext,
    prefix: str = "",
    head: nn.Module | None = None,
) -> None:
    """Have vLLM's quantized layers in the places of plain ones, and log which.

    The output head, and a layer whose weight is shared, stay as they are; so do layers
    that the quantization leaves out. A module that gives `quant_config` to layers of
    vLLM's has made its own choice, and is not changed.

    Args:
        architecture: The registered name.
        module: With its plans applied. Its linear layers are replaced in place, and
            keep their names; the new parameters are on the current default device.
        vllm_config: The engine's config, whose `quant_config` is None or says what is
            quantized, and how.
        context: The place of this rank.
        prefix: Of the names of the model's layers in the engine.
        head: The output head, if it was seen. Default: what has as many outputs as
            there are tokens.

    """
    if vllm_config.quant_config is None or quantizes(module):
        return
    uses = Counter(
        id(parameter)
        for part in module.modules()  # each once
        for parameter in part._parameters.values()
    )
    ranks = context.tensor_parallel_size
    vocab_size = vllm_config.model_config.get_vocab_size()
    made: dict[int, nn.Module] = {}  # by the id of the plain layer
    reached: list[str] = []
    left: dict[str, str] = {}  # and why
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if not path or not isinstance(part, nn.Linear):
            continue
        why = _obstacle(part)
        if part is head or (head is None and _outputs(part, ranks) == vocab_size):
            why = "the output head"
        elif uses[id(part.weight)] > 1:
            why = "its weight is shared"
        if why is None and id(part) not in made:
            name = maybe_prefix(prefix, path)
            layer = _layer(part, vllm_config.quant_config, name, ranks)
            if isinstance(layer.quant_method, UnquantizedLinearMethod):
                why = "left out by the quantization"
            else:
                made[id(part)] = layer
        if why is not None:
            left[path] = why
            continue
        reached.append(path)
        owner, _, leaf = path.rpartition(".")
        module.get_submodule(owner).register_module(leaf, made[id(part)])
    if reached:
        logger.info(
            "%s: quantization=%r reaches %d linear layers (%s)%s.",
            architecture,
            vllm_config.model_config.quantization,
            len(reached),
            ", ".join(dict.fromkeys(map(_pattern, reached))),
            _what_stays(left | _other_weights(module), set(map(_pattern, reached))),
        )


def _outputs(part: nn.Linear, ranks: int) -> int:
    """Outputs of the whole layer, of which this rank may have a part."""
    weight: Any = part.weight
    divided = getattr(weight, MARK, False) and weight.partition_dim == 0
    return part.out_features * (ranks if divided else 1)


def _obstacle(part: nn.Linear) -> str | None:
    """Why another layer cannot do what `part` does."""
    if type(part).forward not in REPLACEABLE or "forward" in vars(part):
        return "a forward of its own"
    if isinstance(part, NonDynamicallyQuantizableLinear):
        return "its weight is read by nn.MultiheadAttention"
    if type(part.weight) is not nn.Parameter:
        return f"its weight is a {type(part.weight).__name__}"
    if part._forward_hooks or part._forward_pre_hooks:
        return "hooks of its own"
    if set(part._parameters) != {"weight", "bias"} or part._buffers or part._modules:
        return "tensors of its own"
    if isinstance(part, RowwiseLinear) and part.blocks > 1:
        return "several matrices in one, whose inputs are divided"
    return None


def _layer(
    part: nn.Linear, quant_config: QuantizationConfig, name: str, ranks: int
) -> LinearBase:
    """A layer of vLLM's that has the matrix of `part`, quantized."""
    common: dict[str, Any] = {
        "bias": part.bias is not None,
        "params_dtype": part.weight.dtype,
        "quant_config": quant_config,
        "prefix": name,
        "return_bias": False,
    }
    inputs, outputs = part.in_features, _outputs(part, ranks)
    if not getattr(part.weight, MARK, False):
        return QuantizedLinear(inputs, outputs, **common)
    if isinstance(part, RowwiseLinear):
        common["input_is_parallel"] = part.input_is_parallel
        return QuantizedRowwiseLinear(inputs * ranks, outputs, **common)
    assert isinstance(part, ColwiseLinear)
    common["gather_output"] = part.gather_output
    blocks = cast(Any, part.weight).partition_stride
    if blocks > 1:
        sizes = [outputs // blocks] * blocks
        return QuantizedPackedColwiseLinear(inputs, sizes, **common)
    return QuantizedColwiseLinear(inputs, outputs, **common)


def _pattern(path: str) -> str:
    """`path` with `*` for the number of a layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _other_weights(module: nn.Module) -> dict[str, str]:
    """Weights that no quantization of linear layers takes, and why."""
    return {
        f"{path}.{leaf}" if path else leaf: "no weight of an nn.Linear"
        for path, part in module.named_modules()
        if not isinstance(part, (nn.Linear, nn.Embedding, LinearBase))
        for leaf, parameter in part._parameters.items()
        if parameter is not None and parameter.dim() > 1
    }


def _what_stays(left: Mapping[str, str], reached: Container[str]) -> str:
    """The end of a sentence: what is not quantized, with the reasons."""
    names: dict[str, list[str]] = {}
    for path, why in left.items():
        # A number says which of the layers that are named by one pattern stays.
        pattern = _pattern(path)
        names.setdefault(why, []).append(path if pattern in reached else pattern)
    stays = ", ".join(
        f"{', '.join(dict.fromkeys(paths))} ({why})" for why, paths in names.items()
    )
    return f"; as they are stay {stays}" if stays else ""
