# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A registered model that takes images, audio or video."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

import torch
from torch import nn

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
from vllm.multimodal.transformers_modality import NUM_TOKENS
from vllm.v1.engine.startup_failure import enter_stage

from .checks import check_takes_embeddings
from .deepstack import beside, layer_features
from .messages import describe
from .mrope import check_types
from .wrapper import CallableModelWrapper


class MultiModalCallableModel(SupportsMultiModal, CallableModelWrapper):
    """A registered model whose module embeds more than tokens.

    Raises:
        TypeError: the module lacks what this needs.

    """

    modalities: ClassVar[tuple[Modality, ...]] = ()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        CallableModelWrapper.__init__(self, vllm_config=vllm_config, prefix=prefix)
        check_embeds(self._arch, self.module, self.modalities)
        why = "it is registered with multimodal inputs"
        check_takes_embeddings(self._arch, self.module, self._forward_keywords, why)
        self._features = layer_features(self._arch, self.module, vllm_config)
        if self.supports_mrope:
            check_types(self._arch, self.module, [one.name for one in self.modalities])

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        for known in cls.modalities:
            if known.name == modality and isinstance(known.placeholder, str):
                return known.placeholder
        return None

    def get_language_model(self) -> Any:
        return _WithoutEncoders(self)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings `[tokens, hidden]` of a step's tokens, and of its inputs.

        Args:
            input_ids: `[tokens]`.
            multimodal_embeddings: As `embed_multimodal` made them.
            is_multimodal: Bool `[tokens]`, those of the inputs.

        """
        embeddings = [] if multimodal_embeddings is None else [*multimodal_embeddings]
        if self._features is not None:
            tokens = len(input_ids)
            embeddings = self._features.keep(tokens, embeddings, is_multimodal)
        return super().embed_input_ids(
            input_ids,
            embeddings,
            is_multimodal=cast(torch.Tensor, is_multimodal),  # None without inputs
        )

    def embed_multimodal(self, **tensors: Any) -> MultiModalEmbeddings:
        """Embeddings `[tokens, hidden]` of each input.

        Where decoder layers add features of the input, these come after it: `[tokens,
        (1 + levels) x hidden]`.

        Args:
            **tensors: as `Modality.process` made them, with one more axis in front, of
                inputs; lists where they differ in shape.

        """
        if hasattr(self.module, "embed_multimodal"):
            return cast(Any, self.module).embed_multimodal(**tensors)
        name = self._inputs.modality_of[next(iter(tensors))]
        features = getattr(self.module, features_of(name))
        tensors.pop(NUM_TOKENS, None)
        # One input at a time: how a library batches them is its own affair.
        rows = zip(*tensors.values(), strict=True)
        levels = 0 if self._features is None else self._features.levels
        return [
            rows_of(features(**dict(zip(tensors, one, strict=True))), levels)
            for one in rows
        ]

    @functools.cached_property
    def _inputs(self) -> ModalityInfo:
        config = self._vllm_config.model_config
        info = MULTIMODAL_REGISTRY.create_processor(config).info
        return cast(ModalityInfo, info)

    def process_weights_after_loading(self) -> None:
        """As of any registered model; then try its largest inputs."""
        super().process_weights_after_loading()
        config = self._vllm_config.model_config
        if self._context.is_first_stage and config.supports_multimodal_inputs:
            self._try_inputs()

    @torch.no_grad()
    def _try_inputs(self) -> None:
        """Embed the largest input of each kind.

        Raises:
            ValueError: the embeddings are not what was registered.

        """
        enter_stage("trying the model on its largest inputs")
        device = self._vllm_config.device_config.device
        dtype = cast(torch.dtype, self._vllm_config.model_config.dtype)
        width = self._vllm_config.model_config.get_inputs_embeds_size()
        for name, tensors in self._inputs.largest.items():
            batch = {
                key: tensor[None].to(
                    device, dtype if tensor.is_floating_point() else None
                )
                for key, tensor in tensors.items()
            }
            try:
                embeddings = self.embed_multimodal(**batch)
            except Exception as error:
                shapes = {key: list(tensor.shape) for key, tensor in batch.items()}
                error.add_note(
                    f"{self._arch}: its largest {name} was tried, as {shapes}: the "
                    "first axis is of inputs."
                )
                raise
            expected = [self._inputs.max_tokens[name], width]
            if self._features is not None:
                embeddings = [each[:, :width] for each in embeddings]
            found = [
                list(one.shape) if isinstance(one, torch.Tensor) else describe(one)
                for one in (embeddings if embeddings is not None else ())
            ]
            if found != [expected]:
                raise ValueError(
                    f"{self._arch}: {type(self.module).__name__} embedded one {name} "
                    f"as {found}; expected [{expected}], a tensor [tokens, hidden] for "
                    f"each input, which becomes {expected[0]} placeholders. Correct "
                    "the module, or num_tokens of its Modality."
                )
            if self.supports_mrope:
                self.try_positions(name, expected[0], tensors)


class _WithoutEncoders:
    """A registered model as one that takes tokens alone."""

    def __init__(self, model: MultiModalCallableModel) -> None:
        self._model = model

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return CallableModelWrapper.embed_input_ids(self._model, input_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.module, name)


def features_of(modality: str) -> str:
    """Hugging Face's name of the method that embeds such inputs."""
    return f"get_{modality}_features"


def check_embeds(
    architecture: str, module: nn.Module, modalities: tuple[Modality, ...]
) -> None:
    """Whether `module` can embed what it is registered with.

    Raises:
        TypeError: it has no method for it.

    """
    if callable(getattr(module, "embed_multimodal", None)):
        return
    for modality in modalities:
        if not callable(getattr(module, features_of(modality.name), None)):
            raise TypeError(
                f"{architecture}: it is registered with multimodal inputs, but "
                f"{type(module).__name__} cannot embed {modality.name}. Add "
                "embed_multimodal(self, **tensors), which gets what process made, "
                "stacked, and returns [tokens, hidden] of each input."
            )


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
    several = multimodal if isinstance(multimodal, list | tuple) else [multimodal]
    for one in several:
        if not isinstance(one, Modality):
            raise TypeError(
                f"{architecture}: multimodal is {describe(one)}; expected a Modality "
                "of vllm.multimodal.modality, or a list of them."
            )
    names = [one.name for one in several]
    if len(names) != len(set(names)):
        raise ValueError(
            f"{architecture}: multimodal has two of {', '.join(names)}; expected one "
            "Modality of each name."
        )
    return tuple(several)


def rows_of(features: Any, levels: int = 0) -> torch.Tensor:
    """Embeddings in what Hugging Face's method returned.

    Args:
        features: A tensor, or an object that has one.
        levels: How many decoder layers add features of an input.

    Returns:
        `[tokens, hidden]`, or with features of decoder layers
        `[tokens, (1 + levels) x hidden]`.

    Raises:
        TypeError: there are none, or features that no layer adds.

    """
    found = getattr(features, "pooler_output", features)
    if isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"it returned {describe(found)} for one input; expected a tensor, or an "
            "object that has one as pooler_output"
        )
    found = found.flatten(0, -2)
    later = getattr(features, "deepstack_features", None)
    return beside(found, later, levels) if later else found
