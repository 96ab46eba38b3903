# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The keys of a registered model's `config.json`."""

import copy
import json
import pickle

import pytest
import torch
from tiny_model import CONFIG, build
from transformers import LlamaConfig

from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.transformers_utils.registered_config import RegisteredModelConfig

KEYS = {
    # Those that a generation config has
    "top_k": 2,
    "temperature": 0.5,
    "max_length": 64,
    "num_beams": 3,
    "use_cache": False,
    # Those that Transformers rewrites, refuses or takes for its own
    "rope_scaling": {"type": "mine", "factor": 2},
    "rope_theta": 500.0,
    "rope_parameters": {"type": "mine", "rope_type": "other"},
    "layer_types": ["mine", "yours"],
    "torch_dtype": "bfloat16",
    "num_labels": 7,
    "id2label": {"0": "a"},
    "label2id": None,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_return_dict": False,
    "torchscript": True,
    "pruned_heads": {"1": [0]},
    "is_decoder": True,
    "is_encoder_decoder": None,
    "chunk_size_feed_forward": 5,
    "problem_type": "mine",
    "per_layer_config": {"0": {"hidden_size": 3}},
    "attn_implementation": "mine",
    "tie_word_embeddings": True,
    "text_config": {"hidden_size": 3, "top_k": 4},
    "nested": {"use_cache": [None, {"temperature": 1}]},
    "nothing": None,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    ModelRegistry.register_model("TinyModel", build)


def config_of(directory, remove=(), options=None, **keys):
    values = {k: v for k, v in (CONFIG | keys).items() if k not in remove}
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig(str(directory), skip_tokenizer_init=True, **(options or {}))


@pytest.mark.parametrize("model_type", [None, "mine"])
def test_a_plain_config_is_what_the_file_says(model_dir, model_type):
    keys = KEYS | ({"model_type": model_type} if model_type else {})
    config = config_of(model_dir, **keys)
    assert config.dtype == torch.bfloat16
    hf_config = config.hf_config
    for same in (
        hf_config,
        copy.copy(hf_config),
        copy.deepcopy(hf_config),
        pickle.loads(pickle.dumps(config)).hf_config,
        RegisteredModelConfig.from_dict(hf_config.to_dict()),
    ):
        assert {key: getattr(same, key) for key in keys} == keys
    written = hf_config.to_dict()
    assert {key: written[key] for key in keys} == keys
    assert json.loads(hf_config.to_json_string())["rope_scaling"]["factor"] == 2


@pytest.mark.parametrize(
    "dtype, expected",
    [("bfloat16", torch.bfloat16), ("torch.float16", torch.float16)],
)
def test_a_dtype_is_kept_and_understood(model_dir, dtype, expected):
    config = config_of(model_dir, dtype=dtype)
    assert config.hf_config.dtype == dtype
    assert config.dtype == expected


@pytest.mark.parametrize("model_type", [{}, {"model_type": "llama"}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_auto_is_the_float32_that_a_callables_file_names(model_dir, model_type, key):
    half = config_of(model_dir, **model_type)
    assert half.dtype == torch.bfloat16
    named = {key: "float32"} | model_type
    assert config_of(model_dir, **named).dtype == torch.float32
    options = {"dtype": "bfloat16"}
    assert config_of(model_dir, options=options, **named).dtype == torch.bfloat16


def test_auto_of_a_class_is_as_in_vllm(model_dir):
    ModelRegistry.register_model("TinyModel", LlamaForCausalLM)
    config = config_of(model_dir, dtype="float32", model_type="llama")
    assert config.dtype == torch.bfloat16


def test_a_dtype_that_torch_does_not_have(model_dir):
    config = config_of(model_dir, dtype="int3", options={"dtype": "float32"})
    assert config.hf_config.dtype == "int3"


def test_a_class_that_transformers_has_keeps_the_keys_that_it_drops(model_dir):
    config = config_of(
        model_dir,
        model_type="llama",
        top_k=2,
        temperature=0.5,
        nothing=None,
        rope_theta=500.0,
        use_cache=False,
    ).hf_config
    assert type(config) is LlamaConfig
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (same.top_k, same.temperature, same.rope_theta) == (2, 0.5, 500.0)
        assert same.nothing is None and not same.use_cache
        assert same.rope_parameters["rope_theta"] == 500.0
        assert same.rms_norm_eps == LlamaConfig().rms_norm_eps


def test_the_name_of_the_directory_says_nothing(model_dir):
    """Transformers takes a config without a model type for what its path names."""
    directory = model_dir / "my-bert-and-llama"
    directory.mkdir()
    assert type(config_of(directory).hf_config) is RegisteredModelConfig


def test_overrides(model_dir):
    config = config_of(
        model_dir,
        top_k=2,
        options={"hf_overrides": {"top_k": 3, "added": 4, "rope_scaling": {"a": 1}}},
    ).hf_config
    assert (config.top_k, config.added, config.rope_scaling) == (3, 4, {"a": 1})


def test_an_architecture_that_only_the_overrides_name(model_dir):
    def override(config):
        config.architectures = ["TinyModel"]
        return config

    for overrides in ({"architectures": ["TinyModel"]}, override):
        config = config_of(
            model_dir, ["architectures"], {"hf_overrides": overrides}, top_k=2
        )
        assert config.architecture == "TinyModel" and config.hf_config.top_k == 2
        assert config.get_diff_sampling_param() == {}


def test_keys_are_no_defaults_of_sampling(model_dir):
    for model_type in ({}, {"model_type": "llama"}):
        config = config_of(
            model_dir, top_k=2, temperature=0.5, eos_token_id=3, **model_type
        )
        assert config.get_diff_sampling_param() == {}
        assert config.try_get_generation_config()["eos_token_id"] == 3
