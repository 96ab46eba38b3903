# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model directory with code of its own."""

import json
import os
import pickle
from pathlib import Path

import pytest
from tiny_model import CONFIG, greedy, trained_model

from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.transformers_utils.auto_map import AutoMapModel, model_reference

CODE = """
import torch
from tiny_model import TinyModel
from torch import nn
from transformers import PreTrainedModel


class OwnModel(TinyModel):
    def __init__(self, config):
        super().__init__()
        assert config.hidden_size == 64 and config.of_its_own == [1, 2]


class Exchangeable(PreTrainedModel):
    _supports_attention_backend = True


def build(vllm_config, parallel_context):
    return OwnModel(vllm_config.model_config.hf_config)
"""
PROMPT = list(range(40))


@pytest.fixture
def directory(model_dir: Path) -> Path:
    (model_dir / "modeling_own.py").write_text(CODE)
    return model_dir


def write_config(directory: Path, **auto_map: str) -> None:
    own = {"architectures": ["OwnModel"], "of_its_own": [1, 2], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(CONFIG | own))


@pytest.mark.parametrize(
    "auto_map, reference",
    [
        (None, None),
        ({"AutoConfig": "c.C"}, None),
        ({"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}, "m.M"),
        ({"AutoModel": "m.M", "VllmModel": "m.build"}, "m.build"),
        ({"AutoModelForCausalLM": [None, "m.M"], "AutoTokenizer": ["t.T"]}, "m.M"),
        ({"VllmModel": [None], "AutoModel": "m.M"}, "m.M"),
    ],
)
def test_what_names_the_model(auto_map, reference):
    assert model_reference(auto_map) == reference


def test_code_that_is_not_trusted_is_not_run(directory):
    (directory / "modeling_own.py").write_text("raise SystemExit('run')")
    write_config(directory, AutoModelForCausalLM="modeling_own.OwnModel")
    message = "names modeling_own.OwnModel as its model, in auto_map, which is code of"
    with pytest.raises(ValueError, match=message):
        ModelConfig(str(directory), skip_tokenizer_init=True)


def test_the_code_is_loaded_and_not_pickled(directory):
    write_config(directory, AutoModelForCausalLM="modeling_own.OwnModel")
    config = ModelConfig(
        str(directory), skip_tokenizer_init=True, trust_remote_code=True
    )
    model = pickle.loads(pickle.dumps(AutoMapModel("modeling_own.build", config)))
    assert model.load().__name__ == "build"
    assert config.registry.models["OwnModel"].inspect_model_cls().supports_pp


def test_code_in_folders(directory):
    (directory / "parts/inner").mkdir(parents=True)
    (directory / "parts/core.py").write_text("from .inner.size import SIZE\n")
    (directory / "parts/inner/size.py").write_text("SIZE = 3\n")
    code = "from .parts.core import SIZE\ndef build(c, p): return SIZE\n"
    (directory / "modeling_parts.py").write_text(code)
    write_config(directory, VllmModel="modeling_parts.build")
    config = ModelConfig(
        str(directory), skip_tokenizer_init=True, trust_remote_code=True
    )
    model = AutoMapModel("modeling_parts.build", config)
    assert model(None, None) == 3
    size = directory / "parts/inner/size.py"
    time = size.stat().st_mtime
    size.write_text("SIZE = 4\n")
    os.utime(size, (time, time))  # as an edit in the same second leaves it
    assert model(None, None) == 4
    assert not list(directory.rglob("__pycache__"))


@pytest.mark.parametrize(
    "code, message",
    [
        (None, "config.json names modeling_bad.build as its model, .* no modeling_bad"),
        ("from .parts.none import X", "No module named .*parts"),
        ("1 / 0", "division by zero"),
    ],
)
def test_code_that_cannot_be_loaded(directory, code, message):
    if code:
        (directory / "modeling_bad.py").write_text(code)
    write_config(directory, VllmModel="modeling_bad.build")
    with pytest.raises((ValueError, ImportError, ZeroDivisionError), match=message):
        ModelConfig(str(directory), skip_tokenizer_init=True, trust_remote_code=True)


def test_a_transformers_model_is_left_to_its_backend(directory):
    write_config(directory, AutoModelForCausalLM="modeling_own.Exchangeable")
    config = ModelConfig(
        str(directory), skip_tokenizer_init=True, trust_remote_code=True
    )
    assert config.architecture.startswith("Transformers")
    write_config(directory, VllmModel="modeling_own.Exchangeable")
    config = ModelConfig(
        str(directory), skip_tokenizer_init=True, trust_remote_code=True
    )
    assert config.architecture == "OwnModel"


@pytest.mark.engine
@pytest.mark.parametrize(
    "key, name", [("AutoModelForCausalLM", "OwnModel"), ("VllmModel", "build")]
)
def test_served(start, directory, key, name):
    write_config(directory, **{key: f"modeling_own.{name}"})
    llm = start(trust_remote_code=True)
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    output = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) == greedy(trained_model(), PROMPT, 8)
