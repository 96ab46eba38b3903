# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The meaning of each value that a `tp_plan` may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vllm.model_executor.models.plans.patterns import kind_of, names_of, resolve_pattern


@dataclass(frozen=True)
class Style:
    """Effect of a `tp_plan` value on the module or parameter it names.

    Args:
        split: Which features of a weight the ranks divide, or that they divide whole
            experts. None leaves it whole on every rank.
        blocks: The number of matrices that are fused along the divided axis, such as
            gate and up. Each of them is divided.
        takes: What the module gets as its input: `part` is this rank's features of an
            input that all ranks have, `share` is the input divided by the number of
            ranks. None is the input as it is.
        gives: What becomes of its output: it is `gathered` or `summed` over the ranks,
            or `routed` to the experts of this rank. None is the output as it is.

    """

    split: Literal["outputs", "inputs", "experts"] | None = None
    blocks: int = 1
    takes: Literal["part", "share"] | None = None
    gives: Literal["gathered", "summed", "routed"] | None = None


_WHOLE = Style()
_COLWISE_REP = Style("outputs", gives="gathered")
_ROWWISE = Style("inputs", gives="summed")
_ROWWISE_REP = Style("inputs", takes="part", gives="summed")

# Every value that is served. They are those of Transformers' `ALL_PARALLEL_STYLES`,
# earlier names included.
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
    # These change nothing here: every rank has all tokens, and there is no gradient.
    "sequence_parallel": _WHOLE,
    "replicate": _WHOLE,
    "replicated_with_grad_allreduce": _WHOLE,
    "mla_kv_a_proj": _WHOLE,
}


@dataclass(frozen=True)
class Entry:
    """An entry of a `tp_plan`: its pattern, and its value as a word and as a style."""

    pattern: str
    style: Style
    word: str


def match_styles(module: nn.Module, plan: Mapping[str, Any]) -> dict[str, Entry]:
    """The entry for every module and parameter that a `tp_plan` names, by that name.

    Raises:
        ValueError: A value is no style, a pattern matches nothing, or two match the
            same name.

    """
    names = names_of(module)
    matched: dict[str, Entry] = {}
    for pattern, word in plan.items():
        if word not in STYLES:
            raise ValueError(
                f"{kind_of(module)}: tp_plan has {pattern!r}: {word!r}, which is not a "
                f"style that is served: {', '.join(STYLES)}."
            )
        for name in resolve_pattern(module, "tp_plan", pattern, names):
            if name in matched:
                raise ValueError(
                    f"{kind_of(module)}: tp_plan names {name} twice, by "
                    f"{matched[name].pattern!r} and by {pattern!r}. Leave one out."
                )
            matched[name] = Entry(pattern, STYLES[word], word)
    return matched
