# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is declared of a callable is true, or is refused with what is missing."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import HEAD_DIM, HEADS, HIDDEN, TinyModel, build, trained_model
from torch import nn

from vllm import LLM, ModelRegistry
from vllm.config import PoolerConfig, VllmConfig
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.models.callable_model.capabilities import (
    BY_NAME,
    CAPABILITIES,
    NOT_DECLARED,
    Capability,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMultiModal,
)
from vllm.model_executor.models.registry import _ModelInfo

PROMPTS = [[1, 2, 3], [(7 * i * i + 3) % 120 for i in range(70)], [9] * 11]


def register(**capabilities: Any) -> None:
    ModelRegistry.register_model("TinyModel", build, **capabilities)


# ---- The list ----------------------------------------------------------------------


def test_the_list_has_what_vllm_asks() -> None:
    asked = {field.name for field in fields(_ModelInfo)} - {"architecture"}
    assert asked <= BY_NAME.keys() | NOT_DECLARED.keys()
    assert not BY_NAME.keys() & NOT_DECLARED.keys()
    for capability in CAPABILITIES:
        assert set(capability.together_with) <= BY_NAME.keys()


def test_what_is_declared_is_what_vllm_is_told() -> None:
    """By the names of vLLM's questions, which are not always those of its classes."""
    attention_free = {"is_attention_free": True}
    for capability in CAPABILITIES:
        if capability.of_class or capability.of_module or capability.together_with:
            continue  # of a real model, below and in docs/models
        if capability.name == "supports_torch_compile":
            continue  # a question of ours
        register(**{capability.name: capability.values[-1]})
        info = ModelRegistry.models["TinyModel"].inspect_model_cls()
        assert getattr(info, capability.name) == capability.values[-1]
    register(**attention_free, has_inner_state=True)
    assert ModelRegistry.models["TinyModel"].inspect_model_cls().has_inner_state


def row(capability: Capability) -> str:
    """What docs/models/registration.md says of it."""
    needs = []
    for where, wanted in (
        ("class", capability.of_class),
        ("module", capability.of_module),
    ):
        if wanted:
            texts = (f"`{n.text}`" if n.name in n.text else n.text for n in wanted)
            needs += [f"on the {where}: {', '.join(texts)}"]
    if capability.together_with:
        needs += [" or ".join(f"`{name}`" for name in capability.together_with)]
    if capability.at_start is not None:
        needs += [capability.at_start]
    values = list(dict.fromkeys(capability.values))
    name = f"`{capability.name}`"
    if not isinstance(values[0], bool):
        name += ": " + ", ".join(f"`{value}`" for value in values)
    return f"| {name} | {capability.declares} | {'; '.join(needs) or 'nothing'} |"


def test_the_docs_have_the_list() -> None:
    page = Path(__file__).parents[3] / "docs/models/registration.md"
    _, _, table = page.read_text().partition("| Capability | Declares | Needs |\n")
    rows = table.partition("\n\n")[0].split("\n")[1:]
    wanted = [row(capability) for capability in CAPABILITIES]
    assert rows == wanted, "The table should be:\n" + "\n".join(wanted)


# ---- When it is declared -----------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"is_hybrid": True}, TypeError, r"_shape_from_config\(cls, vllm_config\)"),
        (
            {"is_hybrid": True},
            TypeError,
            "TinyModel, which the callable's return annotation",
        ),
        ({"is_hybrid": 1}, ValueError, "is_hybrid is 1; expected one of False, True"),
        ({"has_inner_state": True}, TypeError, "without is_hybrid or is_attention"),
        ({"supports_multimodal": True}, TypeError, "MULTIMODAL_REGISTRY.register_p"),
        ({"supports_transcription": True}, TypeError, "without supports_multimodal"),
        ({"supports_transcription_only": True}, TypeError, "without supports_trans"),
        ({"requires_raw_input_tokens": True}, TypeError, "without supports_multimo"),
        ({"score_type": "cross-encoder"}, TypeError, "without is_pooling_model"),
        ({"attn_type": "both"}, ValueError, "expected one of 'decoder', 'encoder_on"),
        ({"default_seq_pooling_type": "FIRST"}, ValueError, "'LAST', 'CLS', 'MEAN'"),
        ({"has_noops": True}, TypeError, "only code of the model's class can make"),
        ({"is_text_generation_model": True}, TypeError, "generates unless is_pooli"),
        ({"supports_lora": True}, TypeError, "can have adapters"),
    ],
)
def test_what_cannot_be_true_is_refused_at_once(
    declared: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register(**declared)
    assert "TinyModel" not in ModelRegistry.models


class Inherits(TinyModel, HasInnerState, IsHybrid):
    """Has the empty methods of the interfaces, and one of its own."""

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        return ()


class Sees(TinyModel, SupportsMultiModal):
    pass


@pytest.mark.parametrize(
    ("annotation", "missing", "present"),
    [
        (Inherits, "get_mamba_state_shape_from_config", "state_copy_func"),
        (Sees, "get_placeholder_str", "embed_multimodal"),
    ],
)
def test_an_interface_alone_is_not_enough(
    annotation: type, missing: str, present: str
) -> None:
    def factory(vllm_config, parallel_context):
        return annotation()

    factory.__annotations__["return"] = annotation
    with pytest.raises(TypeError, match=missing) as error:
        ModelRegistry.register_model("TinyModel", factory)
    assert annotation.__name__ in str(error.value)
    assert present not in str(error.value)


# ---- When it is built --------------------------------------------------------------


class Embedder(TinyModel):
    """Pools by itself, and has no output head."""

    def __init__(self, vllm_config: VllmConfig, causal: bool = True) -> None:
        super().__init__()
        pooler_config = vllm_config.model_config.pooler_config
        self.pooler: Any = DispatchPooler.for_embedding(pooler_config)
        for layer in self.layers:
            layer.attention = TrainableAttention(HEADS, HEAD_DIM, causal=causal)


class Scorer(Embedder):
    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        pooler_config = vllm_config.model_config.pooler_config
        self.score = nn.Linear(HIDDEN, 1, bias=False)
        nn.init.ones_(self.score.weight)
        self.pooler = DispatchPooler.for_seq_cls(pooler_config, classifier=self.score)

    def load_weights(self, weights: Any) -> None:
        self.load_state_dict(dict(weights), strict=False)


def odd_pooler(vllm_config: VllmConfig, context: Any) -> nn.Module:
    model = Embedder(vllm_config)
    model.pooler = nn.Identity()
    return model


def with_a_state(vllm_config: VllmConfig, context: Any) -> nn.Module:
    model = TinyModel()
    shape = SimpleNamespace(conv_L_cache=4, conv_bias=False)
    model.conv = ShortConv(
        shape,
        dim=HIDDEN,
        layer_idx=5,
        model_config=vllm_config.model_config,
        cache_config=vllm_config.cache_config,
        prefix="layers.5.conv",
    )
    return model


class Stateless(TinyModel, IsHybrid):
    """Says that it has a state, which no layer of it has."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        return ((HIDDEN, 3),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return ()


def stateless(vllm_config: VllmConfig, context: Any) -> Stateless:
    return Stateless()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("factory", "declared", "message"),
    [
        (build, {"is_pooling_model": True}, "TinyModel lacks pooler, which is a P"),
        pytest.param(
            odd_pooler,
            {"is_pooling_model": True},
            "is a Identity; expected a Pooler",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c, p: Embedder(c),
            {"is_pooling_model": True, "score_type": "cross-encoder"},
            "needs the task 'classify'; it has embed, token_embed",
            marks=pytest.mark.slow,
        ),
        (
            lambda c, p: Embedder(c, causal=False),
            {"is_pooling_model": True},
            "Register with attn_type='encoder_only'",
        ),
        (build, {"is_attention_free": True}, r"attention.0 is attention. Leave is_at"),
        (with_a_state, {}, r"layers.5.conv \(ShortConv\) has a state"),
        (stateless, {}, "is_hybrid is declared, but no layer has a state"),
    ],
)
def test_what_the_module_is_not_is_refused_at_the_start(
    start: Callable[..., LLM],
    factory: Callable[..., nn.Module],
    declared: Mapping[str, Any],
    message: str,
) -> None:
    ModelRegistry.register_model("TinyModel", factory, **declared)
    pooling = {"runner": "pooling"} if "is_pooling_model" in declared else {}
    with pytest.raises((TypeError, ValueError), match=message):
        start(**pooling)


# ---- What is true ------------------------------------------------------------------


def last_states(model: nn.Module) -> list[torch.Tensor]:
    """`[seq, hidden]` of each prompt."""
    with torch.no_grad():
        return [model(torch.tensor(p), torch.arange(len(p))) for p in PROMPTS]


@pytest.mark.engine
def test_a_pooling_model_whose_tokens_see_later_ones(
    start: Callable[..., LLM], model_dir_with_tokenizer: Any
) -> None:
    ModelRegistry.register_model(
        "TinyModel",
        lambda c, p: Embedder(c, causal=False),
        is_pooling_model=True,
        attn_type="encoder_only",
        default_seq_pooling_type="MEAN",
    )
    llm = start(
        runner="pooling",
        skip_tokenizer_init=False,
        pooler_config=PoolerConfig(use_activation=False),
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    reference = trained_model()
    for layer in reference.layers:
        layer.attention.causal = False
    outputs = llm.embed(prompts, use_tqdm=False)
    for output, states in zip(outputs, last_states(reference), strict=True):
        embedding = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(embedding, states.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.engine
def test_a_cross_encoder_scores_pairs(
    start: Callable[..., LLM], model_dir_with_tokenizer: Any
) -> None:
    ModelRegistry.register_model(
        "TinyModel",
        lambda c, p: Scorer(c),
        is_pooling_model=True,
        score_type="cross-encoder",
    )
    llm = start(
        runner="pooling",
        skip_tokenizer_init=False,
        hf_overrides={"num_labels": 1},
        pooler_config=PoolerConfig(use_activation=False),
    )
    (output,) = llm.score("t1 t2", "t3", use_tqdm=False)
    with torch.no_grad():
        states = trained_model()(torch.tensor([1, 2, 3]), torch.arange(3))
    assert output.outputs.score == pytest.approx(float(states[-1].sum()), abs=1e-3)


@pytest.mark.engine
def test_a_model_that_generates_is_pooled(
    start: Callable[..., LLM], model_dir_with_tokenizer: Any
) -> None:
    """By runner='pooling' alone: the last token, as vLLM does it for its own models."""
    register()
    llm = start(
        runner="pooling",
        skip_tokenizer_init=False,
        max_num_batched_tokens=32,  # the longest prompt is read in chunks
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.embed(prompts, use_tqdm=False)
    for output, states in zip(outputs, last_states(trained_model()), strict=True):
        embedding = torch.tensor(output.outputs.embedding)
        wanted = nn.functional.normalize(states[-1], dim=-1)
        torch.testing.assert_close(embedding, wanted, rtol=1e-4, atol=1e-5)
