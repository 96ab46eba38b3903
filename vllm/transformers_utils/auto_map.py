# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The model that a directory's own code defines, named by `auto_map` in its config."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.parallel_context import ParallelContext

# Names a class or factory for vLLM alone; Transformers does not read it.
VLLM_KEY = "VllmModel"


class AutoMapModel:
    """A factory of the model that `reference` names, as `file.name`.

    A class is called with the config, as Transformers does; anything else as
    `factory(vllm_config, parallel_context)`. The code is loaded where it is needed,
    and not pickled.
    """

    def __init__(self, reference: str, model_config: ModelConfig) -> None:
        self.reference = reference
        self.model = model_config.model
        self.revision = model_config.revision
        self.code_revision = model_config.code_revision

    def load(self) -> Any:
        """The class or factory itself. Runs the directory's code."""
        return get_class_from_dynamic_module(
            self.reference,
            self.model,
            revision=self.revision,
            code_revision=self.code_revision,
        )

    def __call__(
        self, vllm_config: VllmConfig, parallel_context: ParallelContext
    ) -> nn.Module:
        target = self.load()
        if isinstance(target, type):
            return target(vllm_config.model_config.hf_config)
        return target(vllm_config, parallel_context)


def model_reference(auto_map: Mapping[str, str] | None) -> str | None:
    """What `auto_map` names as the model, `VllmModel` before `AutoModel...`."""
    named = auto_map or {}
    keys = [key for key in named if key.startswith("AutoModel")]
    return next((named[key] for key in [VLLM_KEY, *keys] if key in named), None)


def auto_map_model(
    model_config: ModelConfig, known: Container[str]
) -> AutoMapModel | None:
    """The model of the directory's own code, if that is trusted and names one.

    Unless `auto_map` names it as `VllmModel`, `known` architectures come before it,
    and a Transformers model whose attention can be exchanged is left to vLLM's
    Transformers backend.
    """
    auto_map = getattr(model_config.hf_config, "auto_map", None) or {}
    reference = model_reference(auto_map)
    if reference is None or not model_config.trust_remote_code:
        return None
    model = AutoMapModel(reference, model_config)
    if VLLM_KEY in auto_map:
        return model
    if any(arch in known for arch in model_config.architectures):
        return None
    target = model.load()
    if isinstance(target, type) and issubclass(target, PreTrainedModel):
        exchangeable = target.is_backend_compatible()
        if exchangeable or target._can_set_attn_implementation():
            return None
    return model
