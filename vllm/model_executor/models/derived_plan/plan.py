# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`tp_plan="auto"`: a plan read from what a module's layers give to each other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from vllm.model_executor.models.derived_plan.flow import (
    ATTENTION,
    OUTPUT,
    Flow,
    is_layer,
)
from vllm.model_executor.models.plans.patterns import with_wildcards

# What may be divided by itself, in the order in which it is given up.
GROUPS = ("attention", "pairs", "vocabulary")


@dataclass
class AutoPlan:
    """A plan, and what of the module it leaves whole.

    Args:
        styles: Of each layer that is divided, by its name.
        whole: Why each other layer is not.

    """

    styles: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def table(self, module: nn.Module) -> str:
        """One line for the layers of each kind: names, shape, style or why it has none.

        Layers of a stack are in one line.
        """
        rows: dict[tuple[str, str, str], None] = {}
        for name, text in (*self.styles.items(), *self.whole.items()):
            weight = getattr(module.get_submodule(name), "weight", None)
            shape = "" if weight is None else str(list(weight.shape))
            rows[with_wildcards(module, name), shape, text] = None
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in rows
        )


def plan_of(flow: Flow, ranks: int, groups: Collection[str] = GROUPS) -> AutoPlan:
    """The plan for `ranks` ranks of the module whose forward `flow` was seen.

    Args:
        flow: Of the whole module.
        ranks: Tensor-parallel ranks.
        groups: What may be divided.

    """
    plan = AutoPlan()
    if "attention" in groups:
        _divide_attention(flow, ranks, plan)
    if "pairs" in groups:
        _divide_pairs(flow, ranks, plan)
    if "vocabulary" in groups:
        _divide_vocabulary(flow, ranks, plan)
    for name in (*flow.linears, *flow.others):
        if name not in plan.styles:
            why = flow.others.get(name, "no layer takes its output alone, as a whole")
            plan.whole.setdefault(name, f"whole: {why}")
    return plan


def _divide_attention(flow: Flow, ranks: int, plan: AutoPlan) -> None:
    """Query, key and value by their heads, and what takes attention's output."""
    for number, call in enumerate(flow.attention):
        this = f"{ATTENTION}{number}"
        takers = flow.takers(this)
        parts = [call.query, call.key, call.value]
        names = {name for part in parts for name in part if is_layer(name)}
        why = None
        if not all(len(part) == 1 for part in parts) or len(names) < 3:
            why = "query, key and value are not the outputs of three linear layers"
        elif any(flow.takers(name) != {this} for name in names):
            why = "its output goes to other places than attention"
        elif len(takers) != 1 or not is_layer(next(iter(takers))):
            why = "attention's output does not go to one linear layer"
        if why is None:
            (query,), (key,), (value,) = parts
            (output,) = takers
            widths = [flow.linears[name].out_features for name in (query, key, value)]
            kv_heads = widths[1] // call.head_dim
            expected = [
                call.heads * call.head_dim,
                kv_heads * call.head_dim,
                kv_heads * call.value_dim,
            ]
            inputs = call.heads * call.value_dim
            if widths != expected or flow.linears[output].in_features != inputs:
                why = "its features are not the heads of attention"
            elif flow.inputs[output] != {this}:
                why = "the layer after attention takes other inputs, too"
            elif call.heads % ranks or kv_heads % ranks:
                why = f"{ranks} ranks do not divide {call.heads} and {kv_heads} heads"
            else:
                plan.styles |= dict.fromkeys((query, key, value), "colwise")
                plan.styles[output] = "rowwise"
        if why is not None:
            for name in names | {name for name in takers if is_layer(name)}:
                plan.whole[name] = f"whole: {why}"


def _divide_pairs(flow: Flow, ranks: int, plan: AutoPlan) -> None:
    """Layers whose outputs go to one other layer alone, as up and gate go to down."""
    for name, linear in flow.linears.items():
        sources = flow.inputs[name]
        taken = {name, *sources} & plan.styles.keys()
        if not sources or taken or not all(map(is_layer, sources)):
            continue
        if any(flow.takers(source) != {name} for source in sources):
            continue
        if linear.in_features % ranks:
            plan.whole[name] = f"whole: {ranks} ranks do not divide its inputs"
            continue
        styles = {
            source: _style(flow, source, linear.in_features) for source in sources
        }
        if None not in styles.values():
            plan.styles |= {source: style for source, style in styles.items() if style}
            plan.styles[name] = "rowwise"


def _style(flow: Flow, source: str, wanted: int) -> str | None:
    width = flow.linears[source].out_features
    if width == wanted:
        return "colwise"
    if width == 2 * wanted and source in flow.halved:
        return "packed_colwise"
    return None


def _divide_vocabulary(flow: Flow, ranks: int, plan: AutoPlan) -> None:
    head = next(
        (
            name
            for name in reversed(flow.linears)
            if flow.linears[name].out_features >= flow.vocab_size
            and OUTPUT in flow.takers(name)
            and name not in plan.styles
        ),
        None,
    )
    embedding = flow.embedding
    sizes: dict[str, int] = {}
    styles: dict[str, str] = {}
    if head is not None:
        sizes[head] = flow.linears[head].out_features
        styles[head] = "colwise_rep"
    if embedding is not None and flow.embedding_layer is not None:
        sizes[embedding] = flow.embedding_layer.num_embeddings
        styles[embedding] = "rowwise"
    if flow.tied and (head not in flow.tied or embedding is None):
        return  # both are one parameter, and only one of them can be divided
    if any(size % ranks for size in sizes.values()):
        why = f"whole: {ranks} ranks do not divide the vocabulary"
        plan.whole |= dict.fromkeys(sizes, why)
        return
    plan.styles |= styles
