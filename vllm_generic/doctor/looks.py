# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is seen in a model that is built: each function adds rows about one subject."""

from __future__ import annotations

import sysconfig
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.lora.sites import find_sites
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.previous_tokens import PreviousTokens
from vllm.model_executor.layers.trainable_attention.kv_caches import trainable_layers
from vllm.model_executor.models.adapter.adapted import AdaptedModel
from vllm.model_executor.models.callable_model.logits import logits_function
from vllm.model_executor.models.callable_model.wrapper import CallableModelWrapper
from vllm.model_executor.models.self_check.trace import engine_halves
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.load import weights_of
from vllm_generic.doctor.layouts import (
    TENSOR_SIZES,
    bytes_of,
    bytes_of_ranks,
    divided_by_factory,
    gigabytes,
    has_plan,
)
from vllm_generic.doctor.report import Report, State


@dataclass(frozen=True)
class Built:
    """A model as the only worker of an engine has it.

    Args:
        architecture: The name that is registered.
        module: What the factory returned.
        adapted: How it is served, if it was not written for vLLM.
        vllm_config: The engine's config, for one process.
        model_cls: The class by which vLLM knows it, with what was declared.
        tensor_parallel_size: The one that was asked for.
        pipeline_parallel_size: The one that was asked for.

    """

    architecture: str
    module: nn.Module
    adapted: AdaptedModel | None
    vllm_config: VllmConfig
    model_cls: type[CallableModelWrapper]
    tensor_parallel_size: int
    pipeline_parallel_size: int

    @property
    def context(self) -> ParallelContext:
        return ParallelContext.from_config(self.vllm_config.parallel_config)

    def declares(self, capability: str) -> bool:
        """Whether the caller, or the factory's return annotation, declares it."""
        return bool(getattr(self.model_cls, capability, False))


def look(built: Built, report: Report) -> None:
    """Add all that is seen in a model that can be run."""
    _module(built, report)
    _call(built, report)
    _attention(built, report)
    _state(built, report)
    _head(built, report)
    _compilation(built, report)
    _exactness(built, report)
    _adapters(built, report)
    look_at_plans(built, report)


def look_at_plans(built: Built, report: Report) -> None:
    """Add what does not depend on whether the model can be run."""
    _updates(built, report)
    _tensor_parallelism(built, report)
    _pipeline_parallelism(built, report)


def _module(built: Built, report: Report) -> None:
    parameters = list(built.module.parameters())
    numbers = sum({id(p): p.numel() for p in parameters}.values())
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
    report.add(
        "module",
        "ok",
        f"{type(built.module).__name__} of {numbers:,} parameters, "
        f"{gigabytes(bytes_of(parameters))} as {', '.join(dtypes) or 'nothing'}.",
    )


def _call(built: Built, report: Report) -> None:
    adapted = built.adapted
    if adapted is None:
        report.add(
            "call",
            "ok",
            "forward(input_ids [tokens], positions [tokens]), as it is written for "
            "vLLM: the tokens of all sequences on one axis.",
        )
        return
    form, origins = adapted.seen.form, adapted.seen.origins
    text = f"{form}, as it stands. "
    if form.positions is not None:
        text += f"Positions are given as {form.positions}. "
    for origin in origins.values():
        text += f"Positions replace {origin.site.function}, at {_short(origin.line)}. "
    if form.positions is None and not origins:
        text += "It does not use a token's position."
    report.add("call", "ok", text.strip())


def _attention(built: Built, report: Report) -> None:
    rows: Counter[str] = Counter()
    if built.adapted is not None:
        for site, seen in built.adapted.seen.attention.items():
            rows[
                f"{site.function}: "
                + _heads(seen.heads, seen.kv_heads, seen.head_dim, seen.scale)
                + _limits(seen.window, seen.soft_cap, seen.sinks)
                + f", at {_short(seen.line)}"
            ] += 1
    ours = trainable_layers(built.module)
    for layer in ours.values():
        rows[
            f"{type(layer).__name__}: "
            + _heads(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.scale)
            + _limits(
                layer.sliding_window,
                layer.logits_soft_cap,
                layer.sinks,
            )
            + ("" if layer.causal else ", both ways")
        ] += 1
    for part in _engine_layers(built.module):
        if not isinstance(part, MambaBase):
            rows[f"vLLM's {type(part).__name__}, which runs in an engine only"] += 1
    if rows:
        text = "; ".join(f"{number} × {row}" for row, number in rows.items())
        report.add("attention", "ok", f"{text}. Each has a paged KV cache.")
    elif built.declares("is_attention_free"):
        report.add("attention", "ok", "None, as is declared: there is no KV cache.")
    else:
        report.add(
            "attention",
            "note",
            "None is seen: a token sees no other token.",
            "TrainableAttention, or F.scaled_dot_product_attention, where it should; "
            "is_attention_free=True in register_model if it should not",
        )


def _heads(heads: int, kv_heads: int, head_dim: int, scale: float) -> str:
    shared = f", {kv_heads} of keys and values" if kv_heads != heads else ""
    usual = abs(scale * head_dim**0.5 - 1) < 1e-5
    return f"{heads} heads of {head_dim}{shared}" + (
        "" if usual else f", scores × {scale:.6g}"
    )


def _limits(window: int | None, cap: float | None, sinks: Any) -> str:
    return (
        (f", a window of {window}" if window is not None else "")
        + (f", scores capped at {cap:g}" if cap is not None else "")
        + (", sinks" if sinks is not None else "")
    )


def _short(line: str) -> str:
    """`line`, `path:number: code`, without the folder of installed packages."""
    return line.removeprefix(f"{sysconfig.get_path('purelib')}/")


def _engine_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of vLLM's in `module` that our own layers do not hold."""
    halves = engine_halves(module)
    return [
        part
        for part in module.modules()
        if isinstance(part, AttentionLayerBase) and part not in halves
    ]


def _state(built: Built, report: Report) -> None:
    states = Counter(
        type(part).__name__
        for part in built.module.modules()
        if isinstance(part, PreviousTokens)
    )
    states += Counter(
        f"vLLM's {type(part).__name__}"
        for part in _engine_layers(built.module)
        if isinstance(part, MambaBase)
    )
    if states:
        text = ", ".join(f"{number} × {name}" for name, number in states.items())
        without = " No prefix is cached." if "PreviousTokens" in states else ""
        report.add("state", "ok", f"{text}, kept for each request.{without}")
    else:
        report.add("state", "ok", "No layer keeps a state beside attention.")


def _head(built: Built, report: Report) -> None:
    if built.declares("is_pooling_model"):
        report.add("head", "ok", "None is needed: it is declared a pooling model.")
        return
    adapted = built.adapted
    function = None if adapted is None else adapted.logits_function
    try:
        logits_function(
            built.architecture,
            built.module,
            built.vllm_config.model_config.get_vocab_size(),
            1,
            function,
        )
    except TypeError as error:
        report.add("head", "refused", str(error))
        return
    if adapted is not None and adapted.seen.head is not None:
        tail = len(adapted.seen.head.tail)
        text = f"{adapted.seen.head.site}" + f", and {tail} calls after it" * (tail > 0)
        report.add("head", "ok", f"{text}: for sampled tokens only.")
    elif function is not None:
        report.add(
            "head",
            "note",
            "Not seen apart from the rest: all tokens of a step get logits.",
            "adapter=Adapter(head=...) in register_model",
        )
    else:
        own = hasattr(built.module, "compute_logits")
        name = "compute_logits" if own else "the module's output head"
        report.add("head", "ok", f"{name}, for sampled tokens only.")


def _compilation(built: Built, report: Report) -> None:
    if built.vllm_config.model_config.enforce_eager:
        text = "No: enforce_eager is asked for."
    elif built.adapted is not None and not built.adapted.can_be_recorded:
        text = (
            "No: calls are not recorded in a pipeline stage, with adapters, or in the "
            "exact mode."
        )
    elif getattr(built.model_cls, "supports_torch_compile", True) is False:
        text = "No: it is registered with supports_torch_compile=False."
    elif any(isinstance(p, DTensor) for p in built.module.parameters()):
        text = "No: it holds DTensors."
    else:
        text = (
            "It is tried in the first run. What cannot be traced runs eagerly, with a "
            "warning that says why."
        )
    report.add("torch.compile", "ok", text)


def _exactness(built: Built, report: Report) -> None:
    if built.adapted is not None:
        report.add(
            "exact mode",
            "note",
            "Equal bits with VLLM_BATCH_INVARIANT=1 if the trainer's module attends by "
            "vLLM's kernels, too, and computes in batch_invariant().",
            "use_vllm_attention(module) in the trainer, and sum_as_divided(module) if "
            "it has a tp_plan",
        )
        return
    if any(not isinstance(part, MambaBase) for part in _engine_layers(built.module)):
        report.add(
            "exact mode",
            "note",
            "Its attention in training is not the engine's, so log-probabilities "
            "differ by rounding.",
            "TrainableAttention in the module, for equal bits",
        )
        return
    text = "Equal bits with VLLM_BATCH_INVARIANT=1 on one rank"
    leaves = envs.VLLM_BATCH_INVARIANT_LEAVES
    sizes = [size for size in (1, *TENSOR_SIZES) if size <= leaves]
    if has_plan(built.module, "tp_plan", built.vllm_config) or divided_by_factory(
        built.module
    ):
        text = (
            "Equal bits with VLLM_BATCH_INVARIANT=1 at tensor-parallel sizes "
            f"{', '.join(map(str, sizes))} of the engine"
        )
    report.add(
        "exact mode",
        "ok",
        f"{text}, compared with a trainer that computes in batch_invariant().",
    )


def _adapters(built: Built, report: Report) -> None:
    sites = find_sites(built.module, built.context)
    layers = [name for name, site in sites.items() if not site.experts]
    stacks = sorted({_suffix(name) for name in sites.keys() - set(layers)})
    ends = Counter(map(_suffix, layers))
    if not ends:
        report.add("LoRA", "note", "No linear layer or embedding is found to adapt.")
        return
    names = ", ".join(f"{end} ({number})" for end, number in sorted(ends.items()))
    report.add(
        "LoRA",
        "ok",
        f"These layers can have adapters: {names}.",
        f"target_modules={sorted(ends)}",
    )
    if stacks:
        report.add(
            "LoRA",
            "note",
            f"Experts can have adapters in training and in an engine on a CPU: "
            f"{', '.join(stacks)}.",
            f"target_parameters={stacks}",
        )


def _suffix(name: str) -> str:
    """What `target_modules` calls a layer: the end of its name that is no index."""
    owner, _, end = name.rpartition(".")
    return f"{owner.rpartition('.')[2]}.{end}" if end.isdigit() and owner else end


def _updates(built: Built, report: Report) -> None:
    names = weights_of(built.module, built.context).names
    if hasattr(built.module, "load_weights"):
        report.add(
            "live weights",
            "note",
            "The module's own load_weights takes whatever WeightSync sends.",
        )
        return
    tensors = sum(not entry.optional for entry in names.unique())
    text = f"{tensors} tensors by name, in place; any part of them at a time."
    if names.hooked:
        paths = ", ".join(hooked.path or "the module" for hooked in names.hooked)
        text += f" Those of {paths} by its own load_state_dict, whole."
    report.add("live weights", "ok", text)


def _tensor_parallelism(built: Built, report: Report) -> None:
    subject, asked = "tensor parallel", built.tensor_parallel_size
    kind = divided_by_factory(built.module)
    if kind is not None:
        report.add(
            subject,
            "ok",
            f"The factory divides the module itself, by {kind}: its parts at another "
            "size are known when it is called there.",
            f"--self-check with --tensor-parallel-size {max(asked, 2)}",
        )
        return
    if not has_plan(built.module, "tp_plan", built.vllm_config):
        report.add(
            subject,
            "refused" if asked > 1 else "note",
            f"No tp_plan: each of {max(asked, 2)} ranks would hold and compute all.",
            'tp_plan = {"layers.*.attention.[qkv]_proj": "colwise", '
            '"layers.*.attention.o_proj": "rowwise", ...} on the module',
        )
        return
    of_rank: dict[int, int] = {}
    problems: dict[int, str] = {}
    for size in sorted({*TENSOR_SIZES, asked} - {1}):
        try:
            (of_rank[size],) = bytes_of_ranks(built.module, built.vllm_config, size, 1)
        except ValueError as error:
            problems[size] = str(error)
            if size >= asked:  # more ranks have the same problem
                break
    if of_rank:
        sizes = (f"{gigabytes(n)} a rank at size {size}" for size, n in of_rank.items())
        report.add(subject, "ok", f"By its tp_plan: {', '.join(sizes)}.")
    for size, problem in problems.items():
        state: State = "refused" if size == asked else "note"
        report.add(subject, state, f"At size {size}: {problem}")


def _pipeline_parallelism(built: Built, report: Report) -> None:
    subject, asked = "pipeline parallel", built.pipeline_parallel_size
    otherwise: State = "refused" if asked > 1 else "note"
    declared = built.model_cls._registration.builds_stages
    if not has_plan(built.module, "pp_plan", built.vllm_config):
        if declared:
            text = "It is declared: the factory builds each stage."
            report.add(subject, "ok", text)
        else:
            report.add(
                subject,
                otherwise,
                "No pp_plan, and the factory does not declare that it builds stages.",
                "pp_plan on the module, or supports_pp=True in register_model",
            )
        return
    stages = max(asked, 2)
    try:
        sizes = bytes_of_ranks(
            built.module, built.vllm_config, built.tensor_parallel_size, stages
        )
    except ValueError as error:
        report.add(subject, otherwise, f"In {stages} stages: {error}")
        return
    text = ", ".join(gigabytes(size) for size in sizes)
    report.add(subject, "ok", f"By its pp_plan, in {stages} stages: {text}.")
