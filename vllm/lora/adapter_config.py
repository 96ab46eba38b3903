# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What an adapter is: its ranks, its scales, and the modules that it changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import regex as re

ALL_LINEAR = "all-linear"

# Keys of PEFT's adapter_config.json that change what an adapter computes, with the
# values that change nothing. `lora_dropout` is of training alone, and ignored.
REFUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}
# Ways to start a training that leave the base as it was.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter in PEFT's terms.

    Args:
        rank: the number of rows of A, and of columns of PEFT's B.
        alpha: the adapter's output is multiplied by `alpha / rank`.
        target_modules: full names or their last parts, a regular expression for whole
            names, or "all-linear": all linear layers but the output head.
        target_parameters: names or their last parts of parameters that stack the
            weights of a block's experts, such as "experts.down_proj".
        exclude_modules: what of these is left out, in the same form.
        rank_pattern: other ranks, by regular expressions for the ends of names.
        alpha_pattern: other alphas, in the same form.
        use_rslora: multiply by `alpha / sqrt(rank)` instead.

    Raises:
        ValueError: a rank is not positive.

    """

    rank: int = 32
    alpha: float = 32.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"A LoRA's rank is {rank!r}; expected at least 1.")

    def targets(self, name: str, is_linear: bool, is_head: bool) -> bool:
        """Whether the adapter changes the module `name`."""
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        if self.target_modules == ALL_LINEAR:
            return is_linear and not is_head
        return _matches(self.target_modules, name)

    def targets_parameter(self, name: str) -> bool:
        """Whether the adapter changes the parameter `name` of a block's experts."""
        return bool(self.target_parameters) and _matches(self.target_parameters, name)

    def rank_of(self, name: str) -> int:
        return _pattern_value(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        rank = self.rank_of(name)
        alpha = _pattern_value(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdapterConfig:
        """Of the content of an adapter_config.json.

        Raises:
            ValueError: it has something that is not taken; names all of that.

        """
        problems = [
            f"{key}={config[key]!r}"
            for key, harmless in REFUSED.items()
            if config.get(key, harmless[0]) not in harmless
        ]
        if config.get("init_lora_weights", True) not in PLAIN_STARTS:
            problems.append(f"init_lora_weights={config['init_lora_weights']!r}")
        if problems:
            raise ValueError(
                f"The adapter has {', '.join(problems)}, which is not taken; expected "
                "a plain LoRA. Convert it with PEFT, or merge it into the weights."
            )
        missing = [key for key in ("r", "lora_alpha") if config.get(key) is None]
        if missing:
            raise ValueError(f"The adapter's config has no {' and no '.join(missing)}.")
        parameters = tuple(sorted(config.get("target_parameters") or ()))
        default = () if parameters else ALL_LINEAR
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=_as_patterns(config.get("target_modules")) or default,
            target_parameters=parameters,
            exclude_modules=_as_patterns(config.get("exclude_modules")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            use_rslora=config.get("use_rslora", False),
        )

    def to_peft(self, names: Iterable[str]) -> dict[str, Any]:
        """The content of an adapter_config.json for an adapter of what `names` are.

        It names modules and parameters in full, so that PEFT and stock vLLM, whose
        rules differ for heads and embeddings, change exactly these.
        """
        names = sorted(names)
        stacks = [name for name in names if self.targets_parameter(name)]
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": [name for name in names if name not in stacks],
            "target_parameters": stacks or None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora,
            "use_dora": False,
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "inference_mode": True,
            "task_type": None,
            "base_model_name_or_path": None,
        }


def _as_patterns(value: Any) -> str | tuple[str, ...] | None:
    return value if value is None or isinstance(value, str) else tuple(sorted(value))


def ends_with(name: str, end: str) -> bool:
    """Whether `end` is a name of a module, or its last parts."""
    return name == end or name.endswith(f".{end}")


def _matches(patterns: str | tuple[str, ...], name: str) -> bool:
    """By PEFT's rules: a string is a regular expression, others are ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(ends_with(name, end) for end in patterns)


def _pattern_value(values: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in values.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
