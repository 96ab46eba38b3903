# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plans: a plain single-device module, made parallel as its plans say.

`tp_plan`, `pp_plan` and `_no_split_modules` have Hugging Face's form. Unlike there,
patterns are fully qualified names at any depth, and a stack of layers may be a
`ModuleDict`. `apply_plans` checks the plans against the module, takes away what other
pipeline stages own, and leaves each split parameter as this rank's part of it, under
its own name and marked as megatron-core marks its own, so that full checkpoints load.

References: https://huggingface.co/docs/transformers/perf_infer_gpu_multi;
Megatron-LM, https://arxiv.org/abs/1909.08053
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.trainable_attention import TrainableAttention
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import MARK, megatron_layout
from vllm.sequence import IntermediateTensors

# The one tensor between pipeline stages, unless a module has more; vLLM's name.
HIDDEN_STATES = "hidden_states"
STACKS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Style:
    """What one word of a `tp_plan` does to the module or parameter it is said of.

    Args:
        split: Which features of a weight the ranks divide, or whole experts; None
            leaves it whole on every rank.
        blocks: Matrices that are fused along that axis; each is divided.
        takes: Input of the module's forward: `part` of what every rank has.
        gives: Output of it: `gathered` or `summed` over the ranks; `routed` to the
            experts of this one.

    """

    split: Literal["outputs", "inputs", "experts"] | None = None
    blocks: int = 1
    takes: Literal["part", "share"] | None = None
    gives: Literal["gathered", "summed", "routed"] | None = None


_WHOLE = Style()
_COLWISE_REP = Style("outputs", gives="gathered")
_ROWWISE = Style("inputs", gives="summed")
_ROWWISE_REP = Style("inputs", takes="part", gives="summed")

# Transformers adds it to the plan of a config with tied embeddings.
_TIED_EMBEDDING = {"embed_tokens": "embedding_rowwise"}

# The names are those of transformers' `ALL_PARALLEL_STYLES`, old ones included.
STYLES = {
    "colwise": Style("outputs"),
    "colwise_rep": _COLWISE_REP,
    "colwise_gather_output": _COLWISE_REP,
    "rowwise": _ROWWISE,
    "rowwise_rep": _ROWWISE_REP,
    "rowwise_split_input": _ROWWISE_REP,
    "embedding_rowwise": _ROWWISE,
    "packed_colwise": Style("outputs", blocks=2),
    "packed_rowwise": Style("inputs", blocks=2, gives="summed"),
    "grouped_gemm": Style("experts"),
    "ep_router": Style(gives="routed"),
    "moe_tp_experts": Style(gives="summed"),
    "moe_identity_expert": Style(takes="share"),
    "all_reduce": Style(gives="summed"),
    # Every rank has all tokens, and there is no gradient.
    "sequence_parallel": _WHOLE,
    "replicate": _WHOLE,
    "replicated_with_grad_allreduce": _WHOLE,
    "mla_kv_a_proj": _WHOLE,
}


def apply_plans(
    module: nn.Module, vllm_config: VllmConfig, context: ParallelContext
) -> nn.Module:
    """Make this rank's part of `module`, if it has plans, in place.

    Args:
        module: What a factory built, with the whole model's parameters. It or its
            submodules have `tp_plan` or `_tp_plan`, `pp_plan` or `_pp_plan`, and
            `_no_split_modules`; a submodule's names are relative to it. Without
            them, those in `config.json` count: `base_model_tp_plan` and
            `base_model_pp_plan`. An empty one on the module means none at all.
            Those that Transformers has for its models count where they divide.
        vllm_config: The engine's; attention layers that other stages own leave its
            `static_forward_context`.
        context: The place of this rank.

    Returns:
        `module`. Parameter names are as before.

    Raises:
        ValueError: A plan does not fit the module or the parallel layout. The
            message has the pattern.

    """
    hf_config = vllm_config.model_config.hf_config
    splits_tensors = context.tensor_parallel_size > 1
    cuts_stages = context.pipeline_parallel_size > 1
    # All is checked before anything is changed, at one rank as at many.
    tp_plan = _find_plan(module, "tp_plan", hf_config, splits_tensors)
    styles = _match_styles(module, tp_plan)
    splits = _splits(module, styles)
    pp_plan = _find_plan(module, "pp_plan", hf_config, cuts_stages)
    stages = _match_stages(module, pp_plan)
    if splits_tensors:
        _split(module, splits, context)
        _divide_attention(module, styles, context)
        _change_forwards(module, styles, context)
    if cuts_stages and stages is not None:
        _cut_stage(module, stages, vllm_config, context)
    return module


# ---- Plans and patterns --------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A pattern of a `tp_plan`, where it matched."""

    pattern: str
    style: Style
    word: str


@dataclass(frozen=True)
class _Stages:
    """Where a `pp_plan` lets a module be cut."""

    before: list[str]
    stack: str
    after: list[str]
    layer_input: str


def _find_plan(
    module: nn.Module, name: str, hf_config: Any, divides: bool
) -> dict[str, Any]:
    """The module's plan of that name, its submodules' merged into it.

    What Transformers wrote, and not the user, is left out unless the plan `divides`
    the module here.
    """
    attributes = (name, f"_{name}")
    on_module = [getattr(module, attribute, None) for attribute in attributes]
    if {} in on_module and not any(on_module):
        return {}
    defaults: set[str] = set()
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        defaults |= {f"{dot}{pattern}" for pattern in _default_plan(part, name)}
    merged: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for attribute in attributes:
            plan = getattr(part, attribute, None) or {}
            if not isinstance(plan, Mapping):
                raise ValueError(
                    f"{_kind(part)}.{attribute} is a {_kind(plan)}; expected a "
                    "dictionary with names of modules as keys."
                )
            for pattern, value in plan.items():
                full = f"{dot}{pattern}"
                if full in defaults and not divides:
                    continue
                if merged.setdefault(full, value) != value:
                    raise ValueError(
                        f"{_kind(module)}: two plans name {full!r}, as "
                        f"{merged[full]!r} and as {value!r}. Leave one of them out."
                    )
    if not merged:
        merged = _plan_of_file(hf_config, name)
    names = _names(module)
    return {
        pattern: value
        for pattern, value in merged.items()
        # Transformers' plans are for all models of a class: some patterns are for
        # layers that only others have.
        if pattern not in defaults or _matches(pattern, names)
    }


def _default_plan(part: nn.Module, name: str) -> dict[str, Any]:
    """What Transformers' own classes give `part` for a plan."""
    config_cls = type(getattr(part, "config", None))
    plan = dict(getattr(config_cls, f"base_model_{name}", None) or {})
    if plan and name == "tp_plan":
        plan |= _TIED_EMBEDDING
    if type(part).__module__.startswith("transformers."):
        plan |= getattr(type(part), f"_{name}", None) or {}
    return plan


def _plan_of_file(hf_config: Any, name: str) -> dict[str, Any]:
    """The plan in `config.json`, if it is not that of another model's class."""
    plan = dict(getattr(hf_config, f"base_model_{name}", None) or {})
    of_class = getattr(type(hf_config), f"base_model_{name}", None) or {}
    if of_class and plan in (of_class, {**of_class, **_TIED_EMBEDDING}):
        return {}
    return plan


def _match_styles(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, _Entry]:
    """The entry for every module and parameter that `tp_plan` names."""
    names = _names(module)
    matched: dict[str, _Entry] = {}
    for pattern, word in plan.items():
        if word not in STYLES:
            raise ValueError(
                f"{_kind(module)}: tp_plan has {pattern!r}: {word!r}, which is not a "
                f"style that is served: {', '.join(STYLES)}."
            )
        for name in _matching(module, "tp_plan", pattern, names):
            if name in matched:
                raise ValueError(
                    f"{_kind(module)}: tp_plan names {name} twice, by "
                    f"{matched[name].pattern!r} and by {pattern!r}. Leave one out."
                )
            matched[name] = _Entry(pattern, STYLES[word], word)
    return matched


def _match_stages(module: nn.Module, plan: Mapping[str, Any]) -> _Stages | None:
    """The stack of layers, and what belongs before and after it."""
    if not plan:
        return None
    parts = dict(module.named_modules())
    names = [name for name in parts if name]
    no_split = {
        kind
        for part in parts.values()
        for kind in getattr(part, "_no_split_modules", None) or ()
    }
    found: dict[str, str] = {}
    for pattern in plan:
        matches = _matching(module, "pp_plan", pattern, names)
        if len(matches) > 1:
            raise ValueError(
                f"{_kind(module)}: pp_plan has {pattern!r}, which matches "
                f"{' and '.join(matches)}. Name one module."
            )
        (name,) = matches
        for other in found:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(
                    f"{_kind(module)}: pp_plan names {name} twice, by "
                    f"{found[other]!r} and by {pattern!r}. Leave one out."
                )
        cut_inside = list(_owners(name))
        if isinstance(parts[name], STACKS):
            cut_inside.append(name)
        for owner in cut_inside:
            if _kind(parts[owner]) in no_split:
                raise ValueError(
                    f"{_kind(module)}: pp_plan has {pattern!r}, which cuts inside "
                    f"{owner or 'the module'}, a {_kind(parts[owner])}; "
                    "_no_split_modules keeps that whole. Name the stack that holds it."
                )
        found[name] = pattern
    stacks = [name for name in found if isinstance(parts[name], STACKS)]
    if len(stacks) != 1:
        raise ValueError(
            f"{_kind(module)}: pp_plan names {len(stacks)} stacks of layers "
            f"({', '.join(stacks) or 'no ModuleList or ModuleDict'}) by "
            f"{', '.join(map(repr, plan))}; expected one."
        )
    (stack,) = stacks
    inputs, outputs = plan[found[stack]]
    if not inputs or len(outputs) != 1:
        raise ValueError(
            f"{_kind(module)}: pp_plan has {found[stack]!r}: {plan[found[stack]]!r}; "
            "expected ([hidden states, ...], [hidden states]), because a stage hands "
            "over one tensor."
        )
    order = list(found)
    at = order.index(stack)
    return _Stages(order[:at], stack, order[at + 1 :], inputs[0])


def _names(module: nn.Module) -> list[str]:
    """The names of modules and parameters."""
    names = [name for name, _ in module.named_modules() if name]
    return names + [n for n, _ in module.named_parameters(remove_duplicate=False)]


def _matches(pattern: str, names: list[str]) -> list[str]:
    """The names that `pattern` stands for: `*` is any one part of a name, or of it."""
    wanted = pattern.split(".")
    return [
        name
        for name in names
        if len(parts := name.split(".")) == len(wanted)
        and all(map(fnmatchcase, parts, wanted))
    ]


def _matching(
    module: nn.Module, plan: str, pattern: str, names: list[str]
) -> list[str]:
    """The names that `pattern` stands for; none is an error."""
    matches = _matches(pattern, names)
    if not matches:
        known = sorted({_with_wildcards(module, name) for name in names})
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) or known[:3]
        raise ValueError(
            f"{_kind(module)}: {plan} has {pattern!r}, which matches nothing. The "
            f"nearest names are {', '.join(near)}."
        )
    return matches


def _with_wildcards(module: nn.Module, name: str) -> str:
    """`name`, with `*` for each layer of a stack, whose layers are of one kind."""
    parts = name.split(".")
    part = module
    for at, child in enumerate(name.split(".")):
        if not isinstance(part, nn.Module) or child not in part._modules:
            break
        kinds = {type(layer) for layer in part.children()}
        if isinstance(part, STACKS) and len(part) > 1 and len(kinds) == 1:
            parts[at] = "*"
        part = part.get_submodule(child)
    return ".".join(parts)


def _owners(name: str) -> Iterator[str]:
    """The names of the modules that hold `name`, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _kind(value: object) -> str:
    return type(value).__name__


# ---- Pipeline parallelism ------------------------------------------------------------


class _Boundary:
    """Hidden states `[tokens, hidden]` at the ends of a stage, during one forward."""

    received: Any = None
    sent: Any = None


class _EarlierStage(PPMissingLayer):
    """In the place of what an earlier stage computes: what that stage sent."""

    def __init__(self, boundary: _Boundary) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.boundary.received


class _LaterLayer(PPMissingLayer):
    """In the place of a layer of a later stage, which is sent its input."""

    def __init__(self, boundary: _Boundary, layer_input: str) -> None:
        super().__init__()
        self.boundary = boundary
        self.layer_input = layer_input

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self.layer_input in kwargs:
            args = (kwargs[self.layer_input],)
        self.boundary.sent = super().forward(*args, **kwargs)
        return self.boundary.sent


def _cut_stage(
    module: nn.Module,
    stages: _Stages,
    vllm_config: VllmConfig,
    context: ParallelContext,
) -> None:
    """Leave of `module` what this stage computes, and hand over at its ends."""
    layers = list(module.get_submodule(stages.stack)._modules)
    for rank in range(context.pipeline_parallel_size):
        if not replace(context, pipeline_parallel_rank=rank).layer_range(len(layers)):
            raise ValueError(
                f"{_kind(module)}: pipeline stage {rank} of "
                f"{context.pipeline_parallel_size} is left empty: {stages.stack!r} has "
                f"{len(layers)} layers. Use fewer stages."
            )
    owned = context.layer_range(len(layers))

    boundary = _Boundary()
    earlier = functools.partial(_EarlierStage, boundary)
    later = functools.partial(_LaterLayer, boundary, stages.layer_input)
    missing: dict[str, Callable[[], nn.Module]] = {}
    if not context.is_first_stage:
        missing |= dict.fromkeys(stages.before, earlier)
    for index, layer in enumerate(layers):
        if index not in owned:
            missing[f"{stages.stack}.{layer}"] = (
                earlier if index < owned.start else later
            )
    if not context.is_last_stage:
        missing |= dict.fromkeys(stages.after, PPMissingLayer)

    shared = {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{part}.") for part in missing)
    }
    attention = vllm_config.compilation_config.static_forward_context
    for name, placeholder in missing.items():
        part = module.get_submodule(name)
        if any(id(parameter) in shared for parameter in part.parameters()):
            if name.startswith(f"{stages.stack}."):
                raise ValueError(
                    f"{_kind(module)}: {name} shares weights with another pipeline "
                    "stage, which layers of a stack cannot. Use one stage."
                )
            # Tied to a weight of this stage: it loads by either name, and is not run.
            part.forward = placeholder().forward
            continue
        gone = {id(layer) for layer in part.modules()}
        for layer_name in [n for n, layer in attention.items() if id(layer) in gone]:
            del attention[layer_name]
        module.set_submodule(name, placeholder())
    _hand_over(module, boundary, context)


def _hand_over(
    module: nn.Module, boundary: _Boundary, context: ParallelContext
) -> None:
    """Have `module`'s forward take and return what stages hand to each other."""
    whole_forward = module.forward
    signature = inspect.signature(whole_forward)
    declared = "intermediate_tensors" in signature.parameters

    @functools.wraps(whole_forward)
    def forward(
        *args: Any, intermediate_tensors: IntermediateTensors | None = None, **kw: Any
    ) -> Any:
        if intermediate_tensors is not None:
            boundary.received = intermediate_tensors[HIDDEN_STATES]
        if declared:
            kw["intermediate_tensors"] = intermediate_tensors
        result = whole_forward(*args, **kw)
        if not context.is_last_stage:
            result = IntermediateTensors({HIDDEN_STATES: boundary.sent})
        boundary.received = boundary.sent = None
        return result

    if not declared:
        parameters = list(signature.parameters.values())
        at = len(parameters)
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            at -= 1
        keyword = inspect.Parameter(
            "intermediate_tensors", inspect.Parameter.KEYWORD_ONLY, default=None
        )
        signature = signature.replace(
            parameters=[*parameters[:at], keyword, *parameters[at:]]
        )
    forward.__signature__ = signature  # type: ignore[attr-defined]
    module.forward = forward


# ---- Tensor parallelism --------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """How one parameter is split, and by which entry."""

    entry: _Entry
    axis: int
    blocks: int


def _split(
    module: nn.Module, splits: Mapping[str, _Split], context: ParallelContext
) -> None:
    """Keep this rank's part of every parameter that is split."""
    # By id, so that no whole tensor outlives its shard.
    names_of: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        split = splits.get(names[0])
        for name in names[1:]:  # tied weights
            other = splits.get(name)
            if (split and (split.axis, split.blocks)) != (
                other and (other.axis, other.blocks)
            ):
                raise ValueError(
                    f"{_kind(module)}: {names[0]} and {name} are one parameter, but "
                    "tp_plan does not split both in the same way. Name both, as "
                    "rowwise for an embedding and colwise_rep for an output head, or "
                    "neither."
                )
        if split is None:
            continue
        shard = _shard(module, names[0], split, context)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, shard)


def _splits(module: nn.Module, styles: Mapping[str, _Entry]) -> dict[str, _Split]:
    """The parameters that are split."""
    splits: dict[str, _Split] = {}
    for name, entry in styles.items():
        if entry.style.split is None:
            continue
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if leaf in part._parameters:
            parameters = {name: part.get_parameter(leaf)}
        else:
            part = part.get_submodule(leaf)
            # Another forward may do more with the weight than F.linear does.
            plain = type(part).forward in (nn.Linear.forward, nn.Embedding.forward)
            if not plain or entry.style.split == "experts":
                raise ValueError(
                    f"{_kind(module)}: tp_plan has {entry.pattern!r}: {entry.word!r}, "
                    f"but {name} is a {_kind(part)}. Of modules, nn.Linear and "
                    "nn.Embedding are split; of others, name the parameters."
                )
            parameters = dict(part.named_parameters(name, recurse=False))
        for full_name, parameter in parameters.items():
            axis = _axis(entry.style, parameter, isinstance(part, nn.Embedding))
            if axis is None:
                continue
            if full_name in splits:
                raise ValueError(
                    f"{_kind(module)}: tp_plan names {full_name} twice, by "
                    f"{splits[full_name].entry.pattern!r} and by {entry.pattern!r}. "
                    "Leave one out."
                )
            splits[full_name] = _Split(entry, axis, entry.style.blocks)
    return splits


def _axis(style: Style, parameter: nn.Parameter, embedding: bool) -> int | None:
    """The axis of `parameter` that `style` splits."""
    if style.split == "experts":
        return 0
    if parameter.dim() == 1:  # a bias
        return 0 if style.split == "outputs" else None
    # [..., outputs, inputs] of a linear layer, [inputs, outputs] of an embedding
    last = (style.split == "inputs") != embedding
    return parameter.dim() - (1 if last else 2)


@torch.no_grad()
def _shard(
    module: nn.Module,
    name: str,
    split: _Split,
    context: ParallelContext,
) -> nn.Parameter:
    """This rank's part of a parameter, with megatron-core's marks of what it is."""
    full = module.get_parameter(name)
    ranks = context.get_tensor_parallel_world_size()
    size = full.shape[split.axis]
    if size % (ranks * split.blocks):
        blocks = f"{split.blocks} blocks of " if split.blocks > 1 else ""
        raise ValueError(
            f"{_kind(module)}: tp_plan has {split.entry.pattern!r}: "
            f"{split.entry.word!r}, but {name} {list(full.shape)} has {blocks}"
            f"{size // split.blocks} features on axis {split.axis}, which {ranks} "
            "tensor-parallel ranks do not divide. Use a number of ranks that does, or "
            "leave the entry out."
        )
    shape = list(full.shape)
    shape[split.axis] //= ranks
    shard = nn.Parameter(full.new_empty(shape), full.requires_grad)
    setattr(shard, MARK, True)
    shard.partition_dim = split.axis  # type: ignore[attr-defined]
    shard.partition_stride = split.blocks  # type: ignore[attr-defined]
    megatron_layout(shard, context).load(shard, full)
    return shard


def _divide_attention(
    module: nn.Module, styles: Mapping[str, _Entry], context: ParallelContext
) -> None:
    """Give attention layers this rank's heads, where the projections are split."""
    ranks = context.get_tensor_parallel_world_size()
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, TrainableAttention):
            continue
        query = layer.num_heads * layer.head_dim
        key = layer.num_kv_heads * layer.head_dim
        for owner in _owners(name):
            # The nearest module that also holds the query's projection.
            widths = {
                full_name: part.out_features
                for full_name, part in module.get_submodule(owner).named_modules(
                    prefix=owner
                )
                if isinstance(part, nn.Linear)
            }
            if {query, query + 2 * key} & set(widths.values()):
                break
        split = {
            linear: (width, styles[linear])
            for linear, width in widths.items()
            if linear in styles
            and styles[linear].style.split == "outputs"
            and styles[linear].style.gives is None
        }
        for linear, (width, entry) in split.items():
            if width == query + 2 * key:
                raise ValueError(
                    f"{_kind(module)}: tp_plan has {entry.pattern!r}: {entry.word!r}, "
                    f"but {linear} gives query, key and value in one, and its ranks "
                    "would get other parts of them. Make it three linear layers."
                )
        if not {query, key} & {width for width, _ in split.values()}:
            continue
        if layer.sinks is not None and not hasattr(layer.sinks, MARK):
            _, entry = next(iter(split.values()))
            split_sinks = _Split(entry, axis=0, blocks=1)
            layer.sinks = _shard(module, f"{name}.sinks", split_sinks, context)
        try:
            layer.divide_heads(ranks)
        except ValueError as error:
            patterns = {entry.pattern for width, entry in split.values()}
            raise ValueError(
                f"{_kind(module)}: tp_plan splits the projections of {name} by "
                f"{', '.join(map(repr, sorted(patterns)))}, but {error}"
            ) from None


def _change_forwards(
    module: nn.Module, styles: Mapping[str, _Entry], context: ParallelContext
) -> None:
    """Have modules take and give what their styles say."""
    for name, entry in styles.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if leaf not in part._parameters:
            _change_forward(part.get_submodule(leaf), entry.style, context)
        elif entry.style.split == "experts" and hasattr(part, "num_experts"):
            part.num_experts = part.get_parameter(leaf).shape[0]  # type: ignore


def _change_forward(part: nn.Module, style: Style, context: ParallelContext) -> None:
    ranks = context.get_tensor_parallel_world_size()
    rank = context.get_tensor_parallel_rank()
    if isinstance(part, nn.Linear) and style.split is not None:
        part.out_features, part.in_features = part.weight.shape
        if style.split == "inputs":
            part.forward = functools.partial(_sum_of_linear, part)  # type: ignore
    elif isinstance(part, nn.Embedding) and style.split is not None:
        part.num_embeddings, part.embedding_dim = part.weight.shape
        if style.split == "inputs":
            first = rank * part.num_embeddings
            part.forward = functools.partial(  # type: ignore
                _sum_of_embedding, part, first
            )
    elif style.gives == "summed":
        part.register_forward_hook(_sum_outputs)
    if style.gives == "gathered":
        part.register_forward_hook(_gather_outputs)
    elif style.gives == "routed":
        part.register_forward_hook(functools.partial(_route, rank=rank, ranks=ranks))
    if style.takes == "part" and not isinstance(part, nn.Embedding):
        part.register_forward_pre_hook(
            lambda _, args: (args[0].chunk(ranks, dim=-1)[rank], *args[1:])
        )
    elif style.takes == "share":
        part.register_forward_pre_hook(lambda _, args: (args[0] / ranks, *args[1:]))


def _sum_of_linear(part: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`[..., inputs of this rank]` -> `[..., outputs]`; the bias is added once."""
    out = tensor_model_parallel_all_reduce(F.linear(x, part.weight))
    return out if part.bias is None else out + part.bias


def _sum_of_embedding(
    part: nn.Embedding, first: int, token_ids: torch.Tensor
) -> torch.Tensor:
    """`[...]` -> `[..., outputs]`; each token is known to one rank."""
    local = token_ids - first
    known = (local >= 0) & (local < part.num_embeddings)
    out = F.embedding(local.where(known, 0), part.weight)
    return tensor_model_parallel_all_reduce(out * known.unsqueeze(-1))


def _sum_outputs(part: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return tensor_model_parallel_all_reduce(out)


def _gather_outputs(part: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return tensor_model_parallel_all_gather(out)


def _route(
    part: Any, args: Any, out: tuple[torch.Tensor, ...], rank: int, ranks: int
) -> tuple[torch.Tensor, ...]:
    """Keep this rank's experts, by their local index, of what a router returned.

    It returns logits, scores and expert indices, the latter `[tokens, top k]`; what
    goes to other ranks has score 0 and the index after the last local expert.
    """
    logits, scores, indices, *others = out
    experts = part.num_experts // ranks
    here = indices // experts == rank
    return (
        logits,
        scores.masked_fill(~here, 0),
        (indices - rank * experts).where(here, experts),
        *others,
    )
