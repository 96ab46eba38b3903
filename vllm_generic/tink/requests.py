# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The JSON bodies of requests. Fields that a body has beside these are ignored."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    # the API's own names begin with model_, which pydantic keeps for itself
    model_config = ConfigDict(protected_namespaces=())

    def canonical(self) -> bytes:
        """Equal requests have equal bytes."""
        return self.model_dump_json(exclude_none=True).encode()


class CreateSession(Body):
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


class SessionBody(Body):
    session_id: str


class LoraConfig(Body):
    rank: int = Field(32, ge=1, le=512)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Body):
    session_id: str
    model_seq_id: int = Field(ge=0)
    base_model: str
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, Any] | None = None


class ModelBody(Body):
    model_id: str


class AdamParams(Body):
    learning_rate: float = 1e-4
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=0)
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(ModelBody):
    seq_id: int
    adam_params: AdamParams = AdamParams()
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(ModelBody):
    seq_id: int
    path: str | None = None
    overwrite: bool = False
    ttl_seconds: int | None = Field(None, gt=0)
    user_metadata: dict[str, Any] | None = None
    sampling_session_seq_id: int | None = None


class LoadWeights(Body):
    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None


class CreateSamplingSession(Body):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class PromptChunk(Body):
    type: str = "encoded_text"
    tokens: list[int] = []


class Prompt(Body):
    chunks: list[PromptChunk]


class SamplingParams(Body):
    max_tokens: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0)
    top_k: int = -1
    top_p: float = Field(1.0, gt=0, le=1)


class TensorData(Body):
    data: list[int]
    shape: list[int]
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Sample(Body):
    sampling_session_id: str
    seq_id: int = Field(ge=0, lt=2**63)
    prompt: Prompt
    sampling_params: SamplingParams = SamplingParams()
    num_samples: int = Field(1, ge=1, le=1024)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0)
    topk_sample_logprobs: int = Field(0, ge=0)
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = Field(0, ge=0)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)
    record_stability_info: bool | None = None


class RetrieveFuture(Body):
    request_id: str
    allow_metadata_only: bool = False


class WeightsInfo(Body):
    tinker_path: str


class Ttl(Body):
    ttl_seconds: int | None = None


class FinishSession(Body):
    reason: dict[str, Any] | None = None
    detail: str | None = None


class TextSample(Body):
    """Texts in, texts out."""

    prompts: list[str] = Field(min_length=1, max_length=1024)
    model_id: str | None = None
    sampling_params: SamplingParams = SamplingParams()


class TextDatum(Body):
    text: str | None = None
    tokens: list[int] | None = None
    weights: list[float] | None = None


class TextBatch(ModelBody):
    data: list[TextDatum] = Field(min_length=1)


class TextOptim(ModelBody):
    adam_params: AdamParams = AdamParams()


class Lora(Body):
    """An adapter to train, or one from files if lora_path is given."""

    adapter_id: str | None = None
    lora_path: str | None = None
    lora_config: LoraConfig = LoraConfig()
