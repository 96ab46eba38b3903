# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's processor of multimodal inputs, made of a registered model's modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from transformers import BatchFeature

from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    EmbeddingItems,
    MultiModalDataItems,
    MultiModalDataParser,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)

from .modality import Modality


class ModalityInfo(BaseProcessingInfo):
    """What vLLM asks of a model's inputs before there are any.

    Args:
        ctx: The model's config and tokenizer.
        modalities: What the user has said.

    """

    def __init__(
        self, ctx: InputProcessingContext, modalities: Sequence[Modality]
    ) -> None:
        super().__init__(ctx)
        self.modalities = {modality.name: modality for modality in modalities}

    def get_data_parser(self) -> MultiModalDataParser:
        audio = self.modalities.get("audio")
        return MultiModalDataParser(
            target_sr=None if audio is None else audio.sampling_rate
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {name: modality.limit for name, modality in self.modalities.items()}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return self.max_tokens

    @cached_property
    def largest(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of the largest input of each kind."""
        return {
            name: modality.tensors(modality.largest())
            for name, modality in self.modalities.items()
        }

    @cached_property
    def max_tokens(self) -> dict[str, int]:
        """How many placeholders an input of each kind becomes at most."""
        return {
            name: self.modalities[name].count(tensors)
            for name, tensors in self.largest.items()
        }

    @cached_property
    def modality_of(self) -> dict[str, str]:
        """Which modality each tensor is of.

        Raises:
            ValueError: Two have a tensor of one name.

        """
        owners: dict[str, str] = {}
        for name, tensors in self.largest.items():
            for key in tensors:
                if key in owners:
                    raise ValueError(
                        f"process of {owners[key]} and of {name} both make a tensor "
                        f"{key!r}; expected names that tell them apart, because "
                        "embed_multimodal gets them by these names."
                    )
                owners[key] = name
        return owners

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """The token that is repeated for each modality.

        Raises:
            ValueError: A placeholder is not one token of the tokenizer.

        """
        return {
            name: self._id_of(modality) for name, modality in self.modalities.items()
        }

    def _id_of(self, modality: Modality) -> int:
        if isinstance(modality.placeholder, int):
            return modality.placeholder
        tokenizer = self.get_tokenizer()
        ids = tokenizer.encode(modality.placeholder, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(
                f"the placeholder {modality.placeholder!r} of {modality.name} is "
                f"{len(ids)} tokens of the tokenizer ({ids}); expected one of its own. "
                "Add it to the tokenizer as a special token, or name another."
            )
        return ids[0]


class ModalityDummyInputs(BaseDummyInputsBuilder[ModalityInfo]):
    """The largest inputs, with which vLLM reserves memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        tokens = [
            self.info.token_ids[name]
            for name, count in mm_counts.items()
            for _ in range(count)
        ]
        return self.info.get_tokenizer().decode(tokens)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        return {
            name: [self.info.modalities[name].largest()] * count
            for name, count in mm_counts.items()
            if count
        }


class ModalityProcessor(BaseMultiModalProcessor[ModalityInfo]):
    """Makes tensors of inputs, and puts their placeholders into the prompt.

    Raises:
        ValueError: A placeholder is not one token; or the kinds of input have a tensor
            in common.

    """

    requires_tokenizer = False

    def __init__(
        self,
        info: ModalityInfo,
        dummy_inputs: BaseDummyInputsBuilder[ModalityInfo],
        **options: Any,
    ) -> None:
        super().__init__(info, dummy_inputs, **options)
        # When an engine starts, and not at its first request.
        _ = info.token_ids, info.modality_of, info.max_tokens

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> ProcessorInputs:
        # In tokens, because a model may have no tokenizer.
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        prompt = [self.info.token_ids[n] for n in data for _ in range(mm_counts[n])]
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(prompt=prompt, mm_data_items=items)

    def _apply_hf_processor_main(  # type: ignore[override]
        self,
        mm_items: MultiModalDataItems,
        prompt: str | list[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        tensors = self._processed(mm_items)
        if prompt is None:
            return tensors
        # Earlier releases give the prompt, and want its tokens too.
        if isinstance(prompt, str):
            tokenizer = self.info.get_tokenizer()
            prompt = tokenizer.encode(prompt, **(tokenization_kwargs or {}))
        return prompt, tensors, False

    def _processed(self, mm_items: MultiModalDataItems) -> BatchFeature:
        """The tensors of all inputs: for each name a list, one entry for each input."""
        made: dict[str, list[torch.Tensor]] = {}
        for name, items in mm_items.items():
            if isinstance(items, EmbeddingItems):
                raise ValueError(
                    f"embeddings of {name} are no input of a registered model; send "
                    f"the {name} itself."
                )
            for index in range(len(items)):
                tensors = self.info.modalities[name].tensors(items.get(index))
                self._check(name, tensors)
                for key, tensor in tensors.items():
                    made.setdefault(key, []).append(self._cast(tensor))
        return BatchFeature(made)

    def _check(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        expected = self.info.largest[name].keys()
        if tensors.keys() != expected:
            raise ValueError(
                f"process of {name} made tensors {sorted(tensors)}; expected "
                f"{sorted(expected)}, as it made of its largest input."
            )
        count = self.info.modalities[name].count(tensors)
        if count > self.info.max_tokens[name]:
            raise ValueError(
                f"this {name} becomes {count} tokens, and the largest that the model "
                f"was registered with becomes {self.info.max_tokens[name]}. Let "
                "process make it smaller, or register a larger one."
            )

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            tensor = tensor.to(self.info.ctx.model_config.dtype)
        return tensor

    def _apply_prompt_updates(self, token_ids: list[int], updates: Any) -> Any:
        for name, of_items in updates.items():
            found = token_ids.count(self.info.token_ids[name])
            if found < len(of_items):
                placeholder = self.info.modalities[name].placeholder
                raise ValueError(
                    f"the prompt has {found} of {name}'s placeholder {placeholder!r} "
                    f"for {len(of_items)} inputs; expected {len(of_items)} "
                    "placeholders. Write one for each, as a chat template does."
                )
        return super()._apply_prompt_updates(token_ids, updates)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            key: MultiModalFieldConfig.batched(self.info.modality_of[key])
            for key in hf_inputs
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = []
        for name, items in out_mm_kwargs.items():
            token_id = self.info.token_ids[name]
            modality = self.info.modalities[name]
            tensors = [cast(dict[str, torch.Tensor], item.get_data()) for item in items]
            replacements = [[token_id] * modality.count(one) for one in tensors]
            updates.append(
                PromptReplacement(
                    modality=name,
                    target=[token_id],
                    replacement=replacements.__getitem__,
                )
            )
        return updates
