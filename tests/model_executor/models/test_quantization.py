# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plain module's linear layers are quantized as vLLM's own models' are."""

import copy
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed.weight_sync import WeightSync
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.callable_model import quantized_linears
from vllm.model_executor.models.callable_model.quantized_weights import of_module

PROMPT = list(range(40))
GROUP = 64
LEFT_OUT = "model.layers.0.mlp.down_proj"
CPU_FLAGS = Path("/proc/cpuinfo")
# Without it vLLM has no kernel for 4 bits, nor for an fp8 cache, and its products of
# int8 saturate.
needs_avx512 = pytest.mark.skipif(
    CPU_FLAGS.exists() and "avx512" not in CPU_FLAGS.read_text(),
    reason="vLLM's kernels for quantized weights and caches on a CPU need AVX-512",
)
# [4 bits], from the lowest on
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = dict[str, torch.Tensor]


def stock_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


# ---- Checkpoints ---------------------------------------------------------------------


def pack(values: torch.Tensor, axis: int, order: tuple[int, ...]) -> torch.Tensor:
    """Eight values of four bits in each int32, along `axis`."""
    values = values.movedim(axis, -1).unflatten(-1, (-1, 8))
    packed = torch.zeros(values.shape[:-1], dtype=torch.int32)
    for place, index in enumerate(order):
        packed |= values[..., index] << (4 * place)
    return packed.movedim(-1, axis).contiguous()


def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers `[out, in]` from 0, a scale for each group of inputs, what they mean."""
    groups = weight.unflatten(1, (-1, GROUP))  # [out, groups, inputs of one]
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    values = (groups / scale).round().clamp(-8, 7)
    meant = (values * scale).flatten(1)
    return values.flatten(1).int() + 8, scale[..., 0], meant


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scale, meant = four_bits(weight)
    zeros = torch.full(scale.T.shape, 7, dtype=torch.int32)  # stored less one
    return {
        "qweight": pack(values.T, 0, IN_ORDER),
        "scales": scale.T.bfloat16().contiguous(),
        "qzeros": pack(zeros, 1, IN_ORDER),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, meant


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scale, meant = four_bits(weight)
    zeros = torch.full(scale.T.shape, 8, dtype=torch.int32)
    return {
        "qweight": pack(values.T, 1, AWQ_ORDER),
        "scales": scale.T.bfloat16().contiguous(),
        "qzeros": pack(zeros, 1, AWQ_ORDER),
    }, meant


def int8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round()
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", LEFT_OUT],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "dynamic": {f"-:{LEFT_OUT}": {}},
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": [LEFT_OUT],
}


def save_quantized(
    folder: Path,
    quantize: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]],
    quantization: dict[str, Any],
) -> LlamaForCausalLM:
    """A checkpoint as the libraries for quantization write it; what it means."""
    model = stock_model()
    state: Tensors = {}
    for name, part in model.named_modules():
        quantized = name.endswith("_proj") and name != LEFT_OUT
        if isinstance(part, nn.Linear) and quantized:
            tensors, part.weight.data = quantize(part.weight.data)
            state |= {f"{name}.{leaf}": t for leaf, t in tensors.items()}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] + ".qweight" not in state:
            state.setdefault(name, tensor)
    save_file(state, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return model


# ---- Engines -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def unchanged_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    ModelRegistry.register_model(
        "Unchanged",
        lambda vllm_config, parallel_context: AutoModelForCausalLM.from_config(
            vllm_config.model_config.hf_config
        ),
    )


def start(folder: Path, **options: Any) -> LLM:
    return LLM(
        model=str(folder),
        hf_overrides={"architectures": ["Unchanged"]},
        dtype="bfloat16",
        max_model_len=128,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 24,
        **options,
    )


def served(llm: LLM, adapter: LoRARequest | None = None) -> torch.Tensor:
    """Log-probabilities of the prompt's tokens after the first."""
    params = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=0)
    prompt = {"prompt_token_ids": PROMPT}
    output = llm.generate(prompt, params, use_tqdm=False, lora_request=adapter)[0]
    return torch.tensor(
        [
            entry[token].logprob
            for entry, token in zip(output.prompt_logprobs, PROMPT, strict=True)
            if entry is not None
        ]
    )


@torch.no_grad()
def meant(model: nn.Module) -> torch.Tensor:
    tokens = torch.tensor([PROMPT])
    logprobs = model(tokens).logits[0].log_softmax(-1)
    return logprobs[torch.arange(len(PROMPT) - 1), tokens[0, 1:]]


def quantized_layers(worker: Any) -> dict[str, str]:
    model = worker.get_model()
    return {
        name: type(part.quant_method).__name__
        for name, part in model.named_modules()
        if name.endswith("_proj") and hasattr(part, "quant_method")
    }


@pytest.mark.engine
@needs_avx512
@pytest.mark.parametrize(
    ("quantize", "quantization", "method", "distance"),
    [
        pytest.param(int8_channels, COMPRESSED, "CompressedTensors", 0.0, id="w8a8"),
        pytest.param(gptq, GPTQ, "GPTQ", 0.2, id="gptq"),
        pytest.param(awq, AWQ, "AWQ", 0.2, id="awq", marks=pytest.mark.slow),
    ],
)
def test_checkpoint(
    tmp_path, quantize, quantization, method, distance, caplog, monkeypatch
):
    """The served model is the one that the file means, and not the one before."""
    # vLLM's own loggers take the level of the environment.
    monkeypatch.setattr(quantized_linears, "logger", logging.getLogger("test"))
    caplog.set_level(logging.INFO, logger="test")
    model = save_quantized(tmp_path, quantize, quantization)
    llm = start(tmp_path)
    logprobs = served(llm)
    (layers,) = llm.collective_rpc(quantized_layers)
    llm.llm_engine.engine_core.shutdown()
    assert (logprobs - meant(model)).abs().max() < 0.1
    assert (logprobs - meant(stock_model())).abs().max() >= distance
    assert len(layers) == 13 and LEFT_OUT not in layers
    assert all(method in name for name in layers.values())
    assert (
        f"{LEFT_OUT} (left out by the quantization), lm_head (the output head)"
    ) in caplog.text


def save_adapter(folder: Path, model: nn.Module) -> None:
    """An adapter in PEFT's format, whose product is added to the weights of `model`."""
    generator = torch.Generator().manual_seed(3)
    names = ("q_proj", "down_proj")
    factors: Tensors = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name.endswith(names):
            a = torch.randn(4, part.in_features, generator=generator) / 10
            b = torch.randn(part.out_features, 4, generator=generator) / 4
            factors[f"base_model.model.{name}.lora_A.weight"] = a
            factors[f"base_model.model.{name}.lora_B.weight"] = b
            part.weight.data += b @ a
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none"}
    config |= {"target_modules": list(names), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.engine
@needs_avx512
def test_divided_by_a_plan(tmp_path, monkeypatch):
    """Transformers' own plan of the class, on two ranks; an adapter on top."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = save_quantized(tmp_path, int8_channels, COMPRESSED)
    llm = start(tmp_path, tensor_parallel_size=2, enable_lora=True, max_lora_rank=8)
    logprobs = served(llm)
    expected = meant(model)
    save_adapter(tmp_path / "adapter", model)
    adapted = served(llm, LoRARequest("adapter", 1, str(tmp_path / "adapter")))
    llm.llm_engine.engine_core.shutdown()
    assert (logprobs - expected).abs().max() < 0.1
    assert (adapted - meant(model)).abs().max() < 0.1 < (adapted - logprobs).abs().max()


@pytest.mark.engine
def test_updates_are_quantized_again(tmp_path):
    """After an update an engine has the bits of one that starts with its weights."""
    model = stock_model().bfloat16()
    model.save_pretrained(tmp_path)
    llm = start(tmp_path, quantization="fp8_per_channel")
    (layers,) = llm.collective_rpc(quantized_layers)
    before = served(llm)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.25)
    sync = WeightSync(trained, llm)
    sync.update()
    sync.close()
    after = served(llm)
    llm.llm_engine.engine_core.shutdown()
    assert len(layers) == 14
    assert (before - meant(model.float())).abs().max() < 0.5
    trained.save_pretrained(tmp_path)
    fresh = start(tmp_path, quantization="fp8_per_channel")
    again = served(fresh)
    fresh.llm_engine.engine_core.shutdown()
    assert torch.equal(after, again) and not torch.equal(after, before)


class LoadsItself(LlamaForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)


def start_that_loads_itself(folder: Path, **options: Any) -> LLM:
    ModelRegistry.register_model(
        "Unchanged", lambda config, context: LoadsItself(config.model_config.hf_config)
    )
    return start(folder, **options)


@pytest.mark.engine
def test_a_module_that_loads_its_weights_itself(tmp_path):
    """What it writes into its linear layers is quantized."""
    stock_model().bfloat16().save_pretrained(tmp_path)
    by_name = start(tmp_path, quantization="fp8_per_channel")
    expected = served(by_name)
    by_name.llm_engine.engine_core.shutdown()
    llm = start_that_loads_itself(tmp_path, quantization="fp8_per_channel")
    (layers,) = llm.collective_rpc(quantized_layers)
    assert len(layers) == 14 and torch.equal(served(llm), expected)
    other = stock_model().bfloat16()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    other.save_pretrained(tmp_path / "other")
    paths = [str(tmp_path / "other"), str(tmp_path)]
    for path, is_first in zip(paths, (False, True), strict=True):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        llm.reset_prefix_cache()
        assert torch.equal(served(llm), expected) is is_first
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.engine
def test_quantized_files_cannot_be_loaded_by_a_module_itself(tmp_path):
    save_quantized(tmp_path, int8_channels, COMPRESSED)
    with pytest.raises(ValueError, match="has no unquantized weight to write into"):
        start_that_loads_itself(tmp_path)


def scales_of(worker: Any) -> list[tuple[float, float]]:
    layers = worker.get_model().adapted.layers
    paged = [layer.attention.paged for layer in layers]
    return [(one._k_scale_float, one._v_scale_float) for one in paged]


@pytest.mark.engine
@needs_avx512
def test_calibrated_scales_of_a_kv_cache(tmp_path):
    """Keys that float8 cannot hold are cached by the checkpoint's scales."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    quantization = COMPRESSED | {"kv_cache_scheme": scheme | {"symmetric": True}}
    model = save_quantized(tmp_path, int8_channels, quantization)
    state = load_file(tmp_path / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        attention = f"model.layers.{i}.self_attn"
        # The same model, of larger keys and smaller queries.
        for name, factor in (("k_proj", 1000), ("q_proj", 1 / 1000)):
            state[f"{attention}.{name}.weight_scale"] *= factor
            getattr(layer.self_attn, name).weight.data *= factor
        state[f"{attention}.k_scale"] = torch.tensor(30.0 + i)
        state[f"{attention}.v_proj.v_scale"] = torch.tensor(0.0625)
    save_file(state, tmp_path / "model.safetensors")
    llm = start(tmp_path)
    logprobs = served(llm)
    (scales,) = llm.collective_rpc(scales_of)
    llm.collective_rpc("reload_weights")
    again = served(llm)
    llm.llm_engine.engine_core.shutdown()
    assert scales == [(30.0, 0.0625), (31.0, 0.0625)]
    # Without scales it is 0.38, because the keys are cut to 448.
    assert (logprobs - meant(model)).abs().mean() < 0.2
    assert torch.equal(logprobs, again)


class _Cache(torch.nn.Module):
    kv_cache_torch_dtype = torch.float8_e4m3fn
    _k_scale_float = 2.0


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("layers.0.attn.k_scale", True),
        ("layers.0.attn.k_proj.k_scale", True),
        ("layers.0.attn.kv_scale", True),
        ("layers.0.k_scale", True),  # the only one inside
        ("layers.0.mlp.k_scale", False),
        ("k_scale", False),
        ("layers.0.mlp.g_idx", True),
        ("layers.0.mlp.weight", False),
    ],
)
def test_what_a_quantized_checkpoint_has_beside_weights(name, taken):
    caches = {"layers.0.attn": _Cache()}
    rest = of_module(nn.Identity(), caches, [(name, torch.tensor(2.0))])
    assert rest == ([] if taken else [(name, 2.0)])


def test_scales_of_a_cache_in_use_cannot_change():
    weights = [("layers.0.attn.k_scale", torch.tensor(3.0))]
    with pytest.raises(ValueError, match="is 3.0, but the KV cache has 2.0"):
        of_module(nn.Identity(), {"layers.0.attn": _Cache()}, weights)
