# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A registered model that takes images, audio or video."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsMultiModal,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.modality import Modality
from vllm.multimodal.modality_processor import (
    ModalityDummyInputs,
    ModalityInfo,
    ModalityProcessor,
)

from .checks import check_takes_embeddings
from .messages import describe
from .wrapper import CallableModelWrapper

EMBED = (
    "embed_multimodal(self, **tensors), which returns [tokens, hidden] of each input"
)


class MultiModalCallableModel(SupportsMultiModal, CallableModelWrapper):
    """A registered model whose module embeds more than tokens.

    Raises:
        TypeError: the module lacks what this needs.

    """

    modalities: ClassVar[tuple[Modality, ...]] = ()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        CallableModelWrapper.__init__(self, vllm_config=vllm_config, prefix=prefix)
        module = self.module
        if not callable(getattr(module, "embed_multimodal", None)):
            raise TypeError(
                f"{self._arch}: it is registered with multimodal inputs, but "
                f"{type(module).__name__} cannot embed them. Add {EMBED}."
            )
        why = "it is registered with multimodal inputs"
        check_takes_embeddings(self._arch, module, self._forward_keywords, why)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        for known in cls.modalities:
            if known.name == modality and isinstance(known.placeholder, str):
                return known.placeholder
        return None

    def get_language_model(self) -> Any:
        return _WithoutEncoders(self)

    def embed_multimodal(self, **tensors: Any) -> MultiModalEmbeddings:
        """Embeddings `[tokens, hidden]` of each input."""
        return self.module.embed_multimodal(**tensors)


class _WithoutEncoders:
    """A registered model as one that takes tokens alone."""

    def __init__(self, model: MultiModalCallableModel) -> None:
        self._model = model

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return CallableModelWrapper.embed_input_ids(self._model, input_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.module, name)


def multimodal_class(
    modalities: tuple[Modality, ...],
) -> type[MultiModalCallableModel]:
    """The base of a registered model's class that takes these inputs."""
    base = type(
        "MultiModalCallableModel",
        (MultiModalCallableModel,),
        {"modalities": modalities, "__module__": __name__},
    )
    register = MULTIMODAL_REGISTRY.register_processor(
        ModalityProcessor,
        info=functools.partial(ModalityInfo, modalities=modalities),
        dummy_inputs=ModalityDummyInputs,
    )
    return register(base)


def inputs_of(architecture: str, multimodal: Any) -> tuple[Modality, ...]:
    """What was registered as `multimodal`, as a tuple.

    Raises:
        TypeError: it is neither a Modality nor several.
        ValueError: two are of one name.

    """
    if multimodal is None:
        return ()
    if isinstance(multimodal, Modality):
        return (multimodal,)
    several = tuple(multimodal) if isinstance(multimodal, list | tuple) else ()
    if not isinstance(multimodal, list | tuple) or not all(
        isinstance(one, Modality) for one in several
    ):
        raise TypeError(
            f"{architecture}: multimodal is {describe(multimodal)}; expected a "
            "Modality of vllm.multimodal.modality, or a list of them."
        )
    names = [one.name for one in several]
    if len(names) != len(set(names)):
        raise ValueError(
            f"{architecture}: multimodal has two of {', '.join(names)}; expected one "
            "Modality of each name."
        )
    return several
