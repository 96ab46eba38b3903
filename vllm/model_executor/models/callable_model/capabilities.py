# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What can be declared of a registered callable, and what each declaration needs.

The names are those of vLLM's `_ModelInfo`, which is what vLLM asks of a model before it
builds it. `declarations` checks them, and docs/models/registration.md shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from vllm.config.pooler import SequencePoolingType, TokenPoolingType
from vllm.tasks import ScoreType


@dataclass(frozen=True)
class Need:
    """An attribute or a method that a declared capability needs.

    Args:
        name: of the attribute or method.
        text: its name as it is written, with a method's parameters.
        why: what vLLM does with it, as the end of a sentence.

    """

    name: str
    text: str
    why: str


@dataclass(frozen=True)
class Capability:
    """One thing that a caller can declare.

    Args:
        name: as it is declared.
        declares: what is said by it, for the documentation.
        values: what it may be.
        of_class: what vLLM asks for before the model is built, so that the class in the
            callable's return annotation has it.
        of_module: what the module has that the callable returns.
        together_with: other capabilities; without any of them this one means nothing.
        interface: vLLM's class that a model inherits to have it.
        at_start: what else is checked once the module is built, for the documentation.
        attribute: vLLM's name of it on a class, where that is another.
        instead: the end of an error's sentence «leave it out».

    """

    name: str
    declares: str
    values: tuple[Any, ...] = (False, True)
    of_class: tuple[Need, ...] = ()
    of_module: tuple[Need, ...] = ()
    together_with: tuple[str, ...] = ()
    interface: str | None = None
    at_start: str | None = None
    attribute: str | None = None
    instead: str = ""

    def is_declared(self, attributes: Mapping[str, Any]) -> bool:
        """Whether a class with these attributes has it."""
        value = attributes.get(self.attribute or self.name, self.values[0])
        return value != self.values[0]


MULTIMODAL = "supports_multimodal"
STATES = (
    Need(
        "get_mamba_state_shape_from_config",
        "get_mamba_state_shape_from_config(cls, vllm_config)",
        "returns the shapes of one request's states, as MambaStateShapeCalculator",
    ),
    Need(
        "get_mamba_state_dtype_from_config",
        "get_mamba_state_dtype_from_config(cls, vllm_config)",
        "returns their dtypes, as MambaStateDtypeCalculator",
    ),
    Need(
        "get_mamba_state_copy_func",
        "get_mamba_state_copy_func(cls)",
        "returns how each is copied, as MambaStateCopyFuncCalculator",
    ),
)

CAPABILITIES = (
    Capability(
        "supports_pp",
        "pipeline parallelism: the callable builds a stage. A module with a `pp_plan` "
        "needs no declaration",
        at_start="`forward` of a later stage takes `inputs_embeds` or "
        "`intermediate_tensors`",
    ),
    Capability(
        "supports_torch_compile",
        "`False`: do not try to compile",
        values=(True, False),
    ),
    Capability(
        "is_attention_free",
        "no attention, and no KV cache",
        at_start="no layer is attention",
    ),
    Capability(
        "is_hybrid",
        "layers of vLLM's with a state of each request, such as Mamba's, alone or "
        "beside attention",
        of_class=STATES,
        interface="IsHybrid",
        at_start="a layer has a state",
    ),
    Capability(
        "has_inner_state",
        "the same, for what a device has to prepare",
        together_with=("is_hybrid", "is_attention_free"),
        interface="HasInnerState",
    ),
    Capability(
        "is_pooling_model",
        "embeddings or scores instead of text, by a pooler of the module's own; it "
        "needs no output head",
        of_module=(
            Need(
                "pooler",
                "pooler",
                "is a Pooler of vllm.model_executor.layers.pooler, such as "
                "DispatchPooler.for_embedding(vllm_config.model_config.pooler_config)",
            ),
        ),
        instead=": runner='pooling' alone pools the last token of a model that "
        "generates",
    ),
    Capability(
        "attn_type",
        "`encoder_only`: in a pooling model each token sees its whole sequence, which "
        "is then read in one step",
        values=("decoder", "encoder_only"),
    ),
    Capability(
        "default_seq_pooling_type",
        "which token a sequence is pooled to",
        values=("LAST", *get_args(SequencePoolingType)),
    ),
    Capability(
        "default_tok_pooling_type",
        "which tokens are pooled each",
        values=get_args(TokenPoolingType),
    ),
    Capability(
        "score_type",
        "what a pair of texts is scored by",
        values=get_args(ScoreType),
        together_with=("is_pooling_model",),
        at_start="the pooler has the task: `classify` of a `cross-encoder`, "
        "`token_embed` of `late-interaction`",
    ),
    Capability(
        MULTIMODAL,
        "images, audio, video",
        of_class=(
            Need(
                "_processor_factory",
                "a processor, by MULTIMODAL_REGISTRY.register_processor",
                "turns inputs into tensors and placeholder tokens",
            ),
            Need(
                "get_placeholder_str",
                "get_placeholder_str(cls, modality, i)",
                "returns the placeholder of an input in a prompt",
            ),
        ),
        of_module=(
            Need(
                "embed_multimodal",
                "embed_multimodal(self, **kwargs)",
                "returns [tokens, hidden] of each input",
            ),
            Need(
                "embed_input_ids",
                "embed_input_ids(self, input_ids, multimodal_embeddings=None, *, "
                "is_multimodal=None)",
                "puts them in the places of the placeholders",
            ),
        ),
        interface="SupportsMultiModal",
    ),
    Capability(
        "supports_multimodal_raw_input_only",
        "the module embeds inputs in its forward",
        together_with=(MULTIMODAL,),
    ),
    Capability(
        "requires_raw_input_tokens",
        "forward takes token ids beside embeddings",
        together_with=(MULTIMODAL,),
    ),
    Capability(
        "supports_multimodal_encoder_tp_data",
        "ranks divide inputs among them, not their encoder",
        together_with=(MULTIMODAL,),
        attribute="supports_encoder_tp_data",
    ),
    Capability(
        "supports_transcription",
        "speech to text, by the routes of `vllm serve`",
        of_class=(
            Need(
                "supported_languages",
                "supported_languages",
                "maps codes of languages to their names",
            ),
            Need(
                "get_generation_prompt",
                "get_generation_prompt(cls, ...)",
                "returns the prompt for an audio",
            ),
            Need(
                "get_speech_to_text_config",
                "get_speech_to_text_config(cls, model_config, task_type)",
                "returns a SpeechToTextConfig",
            ),
        ),
        together_with=(MULTIMODAL,),
        interface="SupportsTranscription",
    ),
    Capability(
        "supports_transcription_only",
        "no text without audio",
        together_with=("supports_transcription",),
    ),
)
BY_NAME = {capability.name: capability for capability in CAPABILITIES}

# What vLLM also asks, and nobody has to say.
NOT_DECLARED = {
    "supports_lora": "every registered callable can have adapters: its linear layers "
    "and embeddings are found",
    "packed_modules_mapping": "adapters find the layers of a registered callable",
    "embedding_modules": "adapters find the layers of a registered callable",
    "is_text_generation_model": "a model generates unless is_pooling_model is declared",
    "supports_mamba_prefix_caching": "only code of the model's class can make it true",
    "supports_replayssm": "only code of the model's class can make it true",
    "supports_hc_sp": "only code of the model's class can make it true",
    "has_noops": "only code of the model's class can make it true",
    "supported_video_pruning_methods": "only code of the model's class can make it "
    "true",
    "supports_mm_device_do_normalize": "only code of the model's class can make it "
    "true",
}
