# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks of what is registered, and of the module that it builds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.distributed.text_collectives import all_gather_text
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_mrope
from vllm.model_executor.parallel_context import ParallelContext

from .messages import describe, name_of
from .mrope import find_rope_index
from .quantized_linears import quantizes

logger = init_logger(__name__)

CALLBACK_VERSION = 1
"""Of the way in which factories are called: `factory(vllm_config, parallel_context)`.

What a later vLLM has to tell is passed by keyword, as `prefix` is, only to a factory
whose signature names it, which needs no other version. A version is raised when a
factory of the version before could not be called any more, and both are taken for one
release.
"""

FORWARD = "forward(self, input_ids, positions) -> hidden states [tokens, hidden]"

# Names of the argument by which forward takes what the previous pipeline stage
# returned: vLLM's for IntermediateTensors, and the usual one for hidden states.
STAGE_INPUTS = ("intermediate_tensors", "inputs_embeds")

# Optional; vLLM's name and Hugging Face's.
INPUT_EMBEDDINGS = ("embed_input_ids", "get_input_embeddings")


def check_signature(architecture: str, factory: Any) -> bool:
    """Whether `factory` also declares `prefix`.

    Raises:
        TypeError: it cannot be called with two positional arguments.

    """
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        raise TypeError(
            f"{architecture}: {factory.__name__} is a model class, which declares its "
            "capabilities itself, as class attributes. Register it without keywords."
        )
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"{architecture}: expected a callable that returns a module, got a "
            f"{type(factory).__name__} module. Register "
            "`lambda vllm_config, parallel_context: module` instead."
        )
    if not callable(factory):
        raise TypeError(
            f"{architecture}: expected a model class, a callable or a string "
            f"'module:name', got {describe(factory)}."
        )
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some builtins have none to inspect
        return False
    parameter = signature.parameters.get("prefix")
    takes_prefix = parameter is not None and parameter.kind in (
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    keywords = {"prefix": ""} if takes_prefix else {}
    try:
        signature.bind(None, None, **keywords)
    except TypeError as error:
        raise TypeError(
            f"{architecture}: the {name_of(factory)} has the signature {signature}, "
            f"but is called as factory(vllm_config, parallel_context): {error}. Give "
            "it two positional parameters."
        ) from None
    return takes_prefix


# What vLLM takes from config.json. A model may do without the others.
CONFIG_KEYS = {
    "vocab_size": "the number of logits of each token",
    "hidden_size": "the width of hidden states",
    "num_attention_heads": "what tensor-parallel ranks divide, and the size of a head",
    "num_hidden_layers": "the number of layers that pipeline stages divide",
    "max_position_embeddings": "the longest sequence",
}


def check_config(model_config: ModelConfig, generates: bool) -> None:
    """Check the values that vLLM reads of a registered model's config.

    Args:
        model_config: of any model that a callable builds.
        generates: whether the model has logits, and thus needs a `vocab_size`.

    Raises:
        ValueError: one is missing, or is not a number that vLLM can use; or the model
            is an encoder-decoder.

    """
    if getattr(model_config.hf_config, "is_encoder_decoder", False):
        names = ", ".join(model_config.hf_config.architectures or ())
        raise ValueError(
            f"{names}: config.json says is_encoder_decoder, and a registered callable "
            "cannot be an encoder-decoder, whose tokens attend to a second sequence. "
            "Serve vLLM's own model of this architecture, without registering it, or "
            "register a decoder."
        )
    config = model_config.hf_text_config
    for key, use in CONFIG_KEYS.items():
        required = generates and key == "vocab_size"
        if not hasattr(config, key) and not required:
            continue
        value = getattr(config, key, None)
        least = 1 if required else 0
        if not isinstance(value, int) or value < least:
            has = f"has {key}: {value!r}" if hasattr(config, key) else f"has no {key}"
            names = ", ".join(model_config.hf_config.architectures or ())
            raise ValueError(
                f"{names}: config.json {has}; "
                f"vLLM reads it as {use}. Write it under this name, or pass "
                f"hf_overrides={{{key!r}: ...}}."
            )


def check_positions(
    architecture: str, module: nn.Module, model_config: ModelConfig
) -> bool:
    """Whether vLLM has to ask the module for positions of several axes (M-RoPE).

    Models of M-RoPE give an image's tokens such positions. A module of vLLM's
    `SupportsMRoPE` tells vLLM which, and `get_rope_index` of Transformers' own models
    does. vLLM asks if config.json has an `mrope_section`.

    Raises:
        ValueError: it needs positions of several axes, and vLLM cannot ask it for them.

    """
    if supports_mrope(module):
        return True
    if model_config.uses_mrope:
        if find_rope_index(module) is not None:
            return True
        found = "config.json names an mrope_section"
    elif model_config.is_multimodal_model and any(
        callable(getattr(part, "get_rope_index", None)) for part in module.modules()
    ):
        found = "it has get_rope_index, and takes images or other inputs"
    else:
        return False
    raise ValueError(
        f"{architecture}: {type(module).__name__} needs positions of several axes "
        f"(M-RoPE), because {found}; it would get other positions than its own. Return "
        "a module that has supports_mrope = True and get_mrope_input_positions, or "
        "Transformers' get_rope_index, and name the mrope_section in config.json."
    )


def check_quantization(
    architecture: str,
    module: nn.Module,
    vllm_config: VllmConfig,
    context: ParallelContext,
) -> None:
    """Check that some layer quantizes, if quantization was asked for.

    All pipeline stages call this together: one may have no layer that does it.

    Raises:
        ValueError: it is asked for, and no layer does it.

    """
    if vllm_config.quant_config is None:
        return
    found = quantizes(module)
    if context.pipeline_parallel_size > 1:
        answer = "yes" if found else "no"
        found = "yes" in all_gather_text(answer, get_pp_group().cpu_group)
    if not found:
        quantization = vllm_config.model_config.quantization
        raise ValueError(
            f"{architecture}: quantization={quantization!r} is asked for, but no layer "
            f"of {type(module).__name__} does it. It has no plain nn.Linear beside "
            "the output head that the quantization names: give vLLM's linear layers "
            "quant_config=vllm_config.quant_config; or start without quantization, and "
            "take quantization_config out of config.json."
        )


def check_same_on_all_ranks(
    architecture: str, module: nn.Module, context: ParallelContext
) -> None:
    """Compare the module's class and tensors with those of the tensor-parallel group.

    Shapes are left out, because shards may be uneven. With expert parallelism names are
    left out too, because each rank has its own experts.

    Raises:
        ValueError: rank 0 has another; the same on every rank.

    """
    if context.tensor_parallel_size == 1:
        return
    lines = [f"the class {type(module).__module__}.{type(module).__qualname__}"]
    if context.expert_parallel_size == 1:
        lines += [
            f"{name}, {tensor.dim()} axes of {tensor.dtype}"
            for name, tensor in module.state_dict(keep_vars=True).items()
            if isinstance(tensor, torch.Tensor)
        ]
    texts = all_gather_text("\n".join(lines), get_tp_group().cpu_group)
    for rank, text in enumerate(texts):
        if text != texts[0]:
            pairs = zip_longest(texts[0].split("\n"), text.split("\n"))
            first, other = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"{architecture}: tensor-parallel ranks built different models. First "
                f"difference: rank 0 has {first or 'no more tensors'}; rank {rank} has "
                f"{other or 'no more tensors'}. Build the same module on every rank, "
                "each with its shards."
            )


def forward_keywords(
    architecture: str, module: nn.Module, given: Sequence[str] = ()
) -> frozenset[str] | None:
    """Names of forward's other arguments that vLLM may pass, None for any.

    Args:
        architecture: For the error.
        module: Whose forward it is.
        given: Names that vLLM always passes.

    Raises:
        TypeError: forward is missing or cannot take `input_ids`, `positions` and what
            is given.

    """
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        raise TypeError(f"{architecture}: {kind} has no forward. vLLM calls {FORWARD}.")
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None, None, **dict.fromkeys(given))
    except TypeError as error:
        others = "".join(f" and {name}" for name in given)
        raise TypeError(
            f"{architecture}: {kind}.forward{signature} cannot be called with token "
            f"ids and positions{others} ({error}). vLLM calls {FORWARD}."
        ) from None
    parameters = signature.parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(list(signature.parameters)[2:])


def is_hidden_states(found: Any, tokens: int) -> bool:
    """Whether `found` is `[tokens, hidden]`."""
    return isinstance(found, torch.Tensor) and found.dim() == 2 and len(found) == tokens


def check_hidden_states(
    architecture: str, module: nn.Module, found: Any, tokens: int
) -> None:
    """Check that `found`, of a forward of `tokens`, is `[tokens, hidden]`.

    Raises:
        ValueError: It is not.

    """
    if is_hidden_states(found, tokens):
        return
    raise ValueError(
        f"{architecture}: {type(module).__name__}.forward returned {describe(found)} "
        f"for {tokens} tokens; vLLM wants hidden states of shape [{tokens}, hidden]. "
        "Tokens are flattened: drop the batch axis, and leave the output head to "
        "compute_logits."
    )


def stage_input(
    architecture: str, module: nn.Module, keywords: frozenset[str] | None
) -> str:
    """Which argument of forward takes what the previous pipeline stage returned.

    Raises:
        TypeError: forward has none.

    """
    for name in STAGE_INPUTS:
        if keywords is None or name in keywords:
            return name
    raise TypeError(
        f"{architecture}: {type(module).__name__}.forward"
        f"{inspect.signature(module.forward)} of a pipeline stage after the first has "
        "no argument for the hidden states of the stage before. Add "
        "inputs_embeds=None, which gets them as [tokens, hidden], or "
        "intermediate_tensors=None, which gets vLLM's IntermediateTensors; or give the "
        "module a pp_plan, which cuts it into stages."
    )


def warn_without_embeddings(architecture: str, module: nn.Module) -> None:
    """Warn if there are no embeddings: the wrapper has no substitute for them."""
    if not any(hasattr(module, name) for name in INPUT_EMBEDDINGS):
        logger.warning(
            "%s: %s has no embed_input_ids(self, input_ids). It is optional; without "
            "it vLLM cannot serve prompt embeddings.",
            architecture,
            type(module).__name__,
        )


def check_takes_embeddings(
    architecture: str, module: nn.Module, keywords: frozenset[str] | None, why: str
) -> None:
    """Check that the module takes embeddings: if enabled, all requests come as such.

    Args:
        architecture: the registered name.
        module: what the factory built.
        keywords: of its forward; None for any.
        why: it has to take them, as a clause.

    Raises:
        TypeError: it cannot give embeddings, or its forward cannot take them.

    """
    wanted = []
    if not any(hasattr(module, name) for name in INPUT_EMBEDDINGS):
        wanted.append(
            "embed_input_ids(self, input_ids), which returns [tokens, hidden]"
        )
    if keywords is not None and "inputs_embeds" not in keywords:
        wanted.append("inputs_embeds=None to forward, which takes them for input_ids")
    if wanted:
        raise TypeError(
            f"{architecture}: {why}, but {type(module).__name__} cannot take "
            f"embeddings. Add {' and '.join(wanted)}."
        )
