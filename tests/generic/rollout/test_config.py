# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The keys of a rollout: read, checked, refused by name, printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from vllm import AsyncEngineArgs
from vllm_generic.rollout import RolloutConfig
from vllm_generic.rollout.config import REFUSED, defaults
from vllm_generic.rollout.engine_args import engine_args

# As the seed's table and ChatLearn's own files have it.
CHATLEARN = """
includes:
  - base_inference.yaml
n: 4
ignore_eos: ${policy_ignore_eos:False}
top_p: ${policy_top_p:0.9}
top_k: ${policy_top_k:-1}
temperature: ${policy_temperature:0.7}
eval_temperature: 0
eval_top_k: 5
eval_top_p: 0.8
stop_token_list: ${stop_token_list:<EOS>;</s>}
new_token_limit: True
prompt_logprobs: ${prompt_logprobs:None}
max_num_batched_tokens: ${max_num_batched_tokens:32768}
block_size: ${cache_block_size:16}
gpu_memory_utilization: ${gpu_memory_utilization:0.5}
sliding_window: ${sliding_window:None}
tokenizer: ${tokenizer_load:words}
vllm_input_ids_key: input_ids
vllm_prompt_key: prompt
tensor_model_parallel_size: ${policy_tp:2}
"""


class Words:
    """A tokenizer that knows one special token."""

    def get_vocab(self) -> dict[str, int]:
        return {"</s>": 2}

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vllm_policy_inference.yaml").write_text(CHATLEARN)
    (tmp_path / "base_inference.yaml").write_text(
        "includes: [shape.yaml]\nseq_length: 64\nn: 9\nnum_layers: 3\n"
    )
    (tmp_path / "shape.yaml").write_text("num_layers: 2\nhidden_size: 8\n")
    (tmp_path / "rlhf.yaml").write_text(
        "models:\n  policy:\n    model_config_file: vllm_policy_inference.yaml\n"
        "    max_new_tokens: 7\n  reward:\n    model_config_file: reward.yaml\n"
    )
    return tmp_path


def test_a_file_of_chatlearn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("policy_tp", "4")
    config = RolloutConfig.from_yaml(folder / "rlhf.yaml")
    assert config.n == 4  # the file's own key, not the included one
    assert config.seq_length == 64
    assert config.max_new_tokens == 7
    assert config.tensor_model_parallel_size == 4
    assert config.prompt_logprobs is None and config.sliding_window is None
    assert config.model_args == {"num_layers": 3, "hidden_size": 8}
    alone = RolloutConfig.from_yaml(folder / "vllm_policy_inference.yaml")
    assert alone.max_new_tokens == 256

    train = config.sampling_params(10, 64, tokenizer=Words())
    assert (train.n, train.temperature, train.top_p) == (4, 0.7, 0.9)
    assert train.max_tokens == 7 and train.logprobs == 0
    assert train.stop == ["<EOS>"] and train.stop_token_ids == [2]
    assert config.sampling_params(60, 64, tokenizer=Words()).max_tokens == 4
    held_out = config.sampling_params(10, 64, is_eval=True, tokenizer=Words())
    assert (held_out.n, held_out.temperature) == (1, 0)
    with pytest.raises(ValueError, match=r"stop_token_list has '<EOS>'.*no tokenizer"):
        config.sampling_params(10, 64)


def test_an_evaluation_falls_back_to_the_keys_of_training() -> None:
    config = RolloutConfig(temperature=0.5, top_k=3, new_token_limit=False)
    params = config.sampling_params(10, 64, is_eval=True)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 3, 54)
    config = RolloutConfig(eval_top_k=2, eval_top_p=0.3, eval_min_p=0.1, eval_n=2)
    params = config.sampling_params(10, 64, is_eval=True)
    assert (params.top_k, params.top_p, params.min_p, params.n) == (2, 0.3, 0.1, 2)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_was_given_up_is_named(key: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(f"{key}: 1\n")
    with pytest.raises(ValueError, match=f"no key {key}: {re.escape(REFUSED[key])}"):
        RolloutConfig.from_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 1", "unknown key temprature"),
        ("n: 0", "greater than or equal to 1"),
        ("top_p: 2", "less than or equal to 1"),
        ("n: many", "valid integer"),
        ("- n", "holds a list; expected keys"),
        ("includes: policy.yaml", r"circle: policy.yaml → policy.yaml"),
        ("n: ${unset_variable}", "variable unset_variable; set it"),
        ("models: {reward: {n: 1}}", "no section 'policy'; it has reward"),
        ("n: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_wrong_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError), match=message):
        RolloutConfig.from_yaml(file)


def test_defaults_are_printed_and_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(defaults())
    assert RolloutConfig.from_yaml(file) == RolloutConfig()
    assert set(yaml.safe_load(defaults())) == {f.name for f in fields(RolloutConfig)}


@pytest.mark.slow
def test_the_command_prints_them() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "vllm_generic.rollout"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert defaults() in printed.stdout


def test_a_sliding_window_is_the_models(tmp_path: Path) -> None:
    config = {"architectures": ["Windowed"], "sliding_window": 8}
    keys = RolloutConfig(model=str(tmp_path), sliding_window=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert engine_args(keys)["hf_overrides"] == {"sliding_window": 4}
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sliding_window is 4, and the model's config"):
        engine_args(keys)
    with pytest.raises(ValueError, match="no key model. Name the model's directory"):
        engine_args(RolloutConfig())


def test_arguments_of_the_engine(tmp_path: Path) -> None:
    """Each key under vLLM's name, and what is not set is vLLM's to decide."""
    config = RolloutConfig(
        model=str(tmp_path),
        max_num_batched_tokens=64,
        block_size=32,
        tensor_model_parallel_size=2,
        engine_args={"max_logprobs": 5, "enforce_eager": True},
    )
    args = AsyncEngineArgs(**engine_args(config))
    assert (args.max_num_batched_tokens, args.block_size) == (64, 32)
    assert (args.tensor_parallel_size, args.max_logprobs) == (2, 5)
    assert args.enforce_eager and args.skip_tokenizer_init
    assert args.max_num_seqs is AsyncEngineArgs.max_num_seqs
    (tmp_path / "tokenizer.json").touch()
    assert engine_args(config)["skip_tokenizer_init"] is False
