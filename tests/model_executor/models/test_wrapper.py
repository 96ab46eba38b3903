# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the wrapper refuses or allows of a module, without an engine."""

import contextlib
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from vllm.config import CompilationMode, ParallelConfig
from vllm.distributed import parallel_state
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.trainable_attention import kv_caches
from vllm.model_executor.models.callable_model import (
    CALLBACK_VERSION,
    _CallableRegisteredModel,
    checks,
    logits,
    wrapper,
)
from vllm.model_executor.models.callable_model.checks import check_config
from vllm.model_executor.models.callable_model.logits import (
    check_logits,
    is_undefined_at_warm_up,
    logits_function,
)
from vllm.model_executor.parallel_context import ParallelContext

VOCAB, HIDDEN, TOKENS = 8, 4, 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids, positions):
        return self.embedding(input_ids)


class TakesEmbeddings(Model):
    def forward(self, input_ids, positions, inputs_embeds=None):
        return self.embedding(input_ids) if inputs_embeds is None else inputs_embeds

    def get_input_embeddings(self):
        return self.embedding


@pytest.fixture
def wrap(monkeypatch):
    """Wrap what `factory` builds, on one rank."""

    def wrapped(
        factory=None,
        quant_config=None,
        dtype=torch.float32,
        embeds=False,
        callback=None,
    ):
        monkeypatch.setattr(parallel_state, "_PP", SimpleNamespace(rank_in_group=0))
        monkeypatch.setattr(
            wrapper, "set_current_vllm_config", lambda _: contextlib.nullcontext()
        )
        monkeypatch.setattr(
            wrapper, "set_forward_context", lambda *_, **__: contextlib.nullcontext()
        )
        model_config = SimpleNamespace(
            get_vocab_size=lambda: VOCAB,
            get_hidden_size=lambda: HIDDEN,
            max_model_len=64,
            runner_type="generate",
            dtype=dtype,
            enable_prompt_embeds=embeds,
            quantization="fp8" if quant_config else None,
            hf_config=PretrainedConfig(),
            hf_text_config=PretrainedConfig(),
            uses_mrope=False,
            is_multimodal_model=False,
        )
        config = SimpleNamespace(
            additional_config={},
            quant_config=quant_config,
            lora_config=None,
            speculative_config=None,
            weight_transfer_config=None,
            parallel_config=ParallelConfig(),
            model_config=model_config,
            device_config=SimpleNamespace(device="cpu"),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
            compilation_config=SimpleNamespace(
                mode=CompilationMode.NONE,
                static_forward_context={},
                static_all_moe_layers=[],
            ),
        )
        monkeypatch.setattr(kv_caches, "get_current_vllm_config", lambda: config)
        callback = callback or (lambda c, p: factory())
        registered = _CallableRegisteredModel("M", callback, {})
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as vLLM does while it builds
        try:
            return registered.load_model_cls()(vllm_config=config)
        finally:
            torch.set_default_dtype(previous)

    return wrapped


# ---- Logits ------------------------------------------------------------------------


@pytest.mark.parametrize("row", [[-math.inf, 1.0], [1.0, 2.0]])
def test_ids_that_are_no_tokens_may_be_masked(row):
    check_logits("M", torch.tensor([[0.0, 1.0], row]))


@pytest.mark.parametrize(
    "row, message",
    [
        ([math.nan, 1.0], "1 of 4 logits are not finite at warm-up"),
        ([math.inf, 1.0], "1 of 4 logits are not finite at warm-up"),
        ([-math.inf, -math.inf], "all logits of 1 of 2 tokens are -inf"),
    ],
)
def test_overflow(row, message):
    with pytest.raises(ValueError, match=message):
        check_logits("M", torch.tensor([[0.0, 1.0], row]))


class VllmState(nn.Module, MambaBase):
    """As one of vLLM's layers with a state."""

    mamba_type = "mamba2"

    def get_state_shape(self):
        return ((1,),)

    def get_state_dtype(self):
        return (torch.float32,)


class OwnState(VllmState):
    def get_kv_cache_spec(self, vllm_config):
        return None


@pytest.mark.parametrize(
    "layer, undefined", [(VllmState, True), (OwnState, False), (nn.Identity, False)]
)
def test_logits_are_not_looked_at_if_vllm_leaves_them_unset_at_warm_up(
    layer, undefined
):
    assert is_undefined_at_warm_up(nn.Sequential(layer())) is undefined


def mark_as_megatron(head):
    head.weight.tensor_model_parallel = True
    head.weight.partition_dim = 0


def mark_as_vllm(head):
    head.weight.weight_loader = lambda parameter, weight: None


@pytest.mark.parametrize("mark", [mark_as_megatron, mark_as_vllm])
def test_divided_logits_are_gathered(monkeypatch, mark):
    model = Model()
    model.lm_head = nn.Linear(HIDDEN, VOCAB // 2, bias=False)
    mark(model.lm_head)
    monkeypatch.setattr(
        logits, "tensor_model_parallel_all_gather", lambda x: torch.cat([x, x], -1)
    )
    hidden = torch.ones(TOKENS, HIDDEN)
    assert logits_function("M", model, VOCAB, 2)(hidden).shape == (TOKENS, VOCAB)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_head_that_is_too_narrow_is_not_gathered(ranks):
    model = Model()
    model.lm_head = nn.Linear(HIDDEN, VOCAB // 2)
    hidden = torch.ones(TOKENS, HIDDEN)
    with pytest.raises(ValueError, match=r"have shape \[3, 4\]; expected \[3, 8\]"):
        logits_function("M", model, VOCAB, ranks)(hidden)


# ---- What is asked of a module -----------------------------------------------------


def test_quantization_that_no_layer_does(wrap):
    message = "M: quantization='fp8' is asked for, but no layer of Model does it"
    with pytest.raises(ValueError, match=message):
        wrap(Model, quant_config=object())

    def quantized():
        model = Model()
        model.lm_head.quant_config = object()  # as one of vLLM's layers has it
        return model

    wrap(quantized, quant_config=object())


def test_an_optional_method_that_is_missing_is_a_warning(wrap, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    wrap(TakesEmbeddings)
    assert "optional" not in caplog.text
    wrap(Model)
    assert "Model has no embed_input_ids(self, input_ids). It is optional" in (
        caplog.text
    )


def test_where_trainers_look_for_layers(wrap):
    """verl's updates refuse what has no `model`."""
    plain = wrap(Model)
    assert plain.model is plain.module
    assert "model" not in dict(plain.named_children())

    class Outer(Model):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(1, 1)

    outer = wrap(Outer)
    assert outer.model is outer.module.model


def test_the_callback_of_version_1(wrap):
    """Two arguments by position, and by keyword only what a signature names."""
    calls = []

    def factory(*args, **kwargs):
        calls.append((len(args), kwargs))
        return Model()

    def with_prefix(config, context, prefix=None):
        calls.append(prefix)
        return Model()

    assert CALLBACK_VERSION == 1
    wrap(callback=factory)
    wrap(callback=with_prefix)
    assert calls == [(2, {}), ""]


@pytest.mark.parametrize("other_stage", ["yes", "no"])
def test_a_pipeline_stage_that_quantizes_nothing(monkeypatch, other_stage):
    group = SimpleNamespace(cpu_group=None)
    monkeypatch.setattr(checks, "get_pp_group", lambda: group)
    monkeypatch.setattr(checks, "all_gather_text", lambda own, _: [own, other_stage])
    config = SimpleNamespace(
        quant_config=object(), model_config=SimpleNamespace(quantization="fp8")
    )
    context = ParallelContext(pipeline_parallel_size=2)
    refused = pytest.raises(ValueError, match="no layer of Linear does it")
    with contextlib.nullcontext() if other_stage == "yes" else refused:
        checks.check_quantization("M", nn.Linear(2, 2), config, context)


def test_prompt_embeddings(wrap):
    wrap(Model)
    wrap(TakesEmbeddings, embeds=True)
    message = "Add embed_input_ids.self, input_ids., .* and inputs_embeds=None to forw"
    with pytest.raises(TypeError, match=message):
        wrap(Model, embeds=True)


@pytest.mark.parametrize("name", ["supports_lora", "packed_modules_mapping"])
def test_adapters_need_not_be_declared(name):
    with pytest.raises(TypeError, match="adapters"):
        _CallableRegisteredModel("M", lambda c, p: Model(), {name: True})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("vocab_size", ..., "has no vocab_size; vLLM reads it as the number of logits"),
        ("vocab_size", 0, "has vocab_size: 0; vLLM reads"),
        ("vocab_size", None, "has vocab_size: None; vLLM reads"),
        ("hidden_size", None, "has hidden_size: None; vLLM reads"),
        ("num_attention_heads", "2", "has num_attention_heads: '2'; vLLM reads"),
        ("max_position_embeddings", None, "has max_position_embeddings: None; vLLM"),
    ],
)
def test_keys_that_vllm_reads(key, value, message):
    values = {"vocab_size": 8, "hidden_size": 4, "num_attention_heads": 2}
    values |= {key: value}
    config = SimpleNamespace(
        architectures=["M"], **{k: v for k, v in values.items() if v is not ...}
    )
    model_config = SimpleNamespace(hf_config=config, hf_text_config=config)
    with pytest.raises(ValueError, match=message):
        check_config(model_config, generates=True)


def test_a_pooling_model_needs_no_vocabulary():
    config = SimpleNamespace(architectures=["M"], hidden_size=4)
    model_config = SimpleNamespace(hf_config=config, hf_text_config=config)
    check_config(model_config, generates=False)
    config.hidden_size = None
    with pytest.raises(ValueError, match="has hidden_size: None"):
        check_config(model_config, generates=False)


# ---- The first call ----------------------------------------------------------------


class Unpacks(Model):
    def forward(self, input_ids, positions):
        batch, length, width = input_ids.shape
        return self.embedding(input_ids)


def test_how_a_module_was_called_is_said(wrap):
    model = wrap(Unpacks)
    with pytest.raises(ValueError, match="not enough values to unpack") as error:
        model.process_weights_after_loading()
    (note,) = error.value.__notes__
    assert note == (
        "Unpacks was tried as forward(input_ids [3], positions [3]): vLLM calls "
        "forward(self, input_ids, positions) -> hidden states [tokens, hidden], with "
        "the tokens of all sequences on one axis, without a batch axis."
    )


class Rotary(Model):
    """Uses its table in float32, and casts the result."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(16), torch.arange(HIDDEN) / 3)
        self.register_buffer("table", angles.cos(), persistent=False)

    def forward(self, input_ids, positions):
        x = self.embedding(input_ids)
        return (x * self.table[positions]).to(x.dtype)


class Sinusoidal(Rotary):
    """Adds its table to activations: a head in bfloat16 cannot take the sum."""

    def forward(self, input_ids, positions):
        return self.embedding(input_ids) + self.table[positions]


def test_a_module_is_tried_once(wrap):
    """verl finishes each update by the call that ends a first load."""
    calls = []

    class Counted(Model):
        def forward(self, input_ids, positions):
            calls.append(len(input_ids))
            return super().forward(input_ids, positions)

    model = wrap(Counted)
    model.load_state_dict(Model().state_dict())
    calls.clear()
    for _ in range(2):
        model.process_weights_after_loading()
    assert calls == [TOKENS]


def test_constants_stay_in_float32(wrap):
    model = wrap(Rotary, dtype=torch.bfloat16)
    model.load_state_dict(Rotary().state_dict())
    model.process_weights_after_loading()
    assert torch.equal(model.table, Rotary().table)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_constants_that_are_added_to_activations_are_rounded(wrap):
    model = wrap(Sinusoidal, dtype=torch.bfloat16)
    model.load_state_dict(Sinusoidal().state_dict())
    model.process_weights_after_loading()
    assert torch.equal(model.table, Sinusoidal().table.bfloat16())
    assert model.module.table is model.table


def test_another_error_rounds_nothing(wrap):
    class Fails(Rotary):
        def forward(self, input_ids, positions):
            raise RuntimeError("of its own")

    model = wrap(Fails, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="of its own"):
        model.process_weights_after_loading()
    assert model.table.dtype == torch.float32
