# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm_generic.doctor`: what it says of models that serve, and of broken ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import planned_model
import pytest
import torch
from plain_gpt import PlainConfig, PlainGPT
from safetensors.torch import save_file
from tiny_model import CONFIG, TinyModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm.model_executor.layers import TrainableAttention
from vllm_generic.doctor import examine

OPTIONS = {"dtype": "float32", "max_model_len": 128}


def tiny(vllm_config, parallel_context):
    return TinyModel()


def planned(vllm_config, parallel_context) -> planned_model.PlanModel:
    return planned_model.PlanModel()


def planned_undeclared(vllm_config, parallel_context):
    return planned_model.PlanModel()


def plain_gpt(vllm_config, parallel_context):
    return PlainGPT(PlainConfig())


class Headless(TinyModel):
    def __init__(self):
        super().__init__()
        self.projection = self.lm_head
        del self.lm_head


class WrittenOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.lm_head = nn.Linear(64, 128)

    def forward(self, ids):
        x = self.embedding(ids)
        scores = x @ x.transpose(-1, -2)
        return self.lm_head(torch.softmax(scores, -1) @ x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.rnn = nn.GRU(64, 64, batch_first=True)
        self.lm_head = nn.Linear(64, 128)

    def forward(self, ids):
        return self.lm_head(self.rnn(self.embedding(ids))[0])


class Reversed(nn.Module):
    """Answers for other tokens than those it is asked about, if there are several."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.attention = TrainableAttention(2, 32)
        self.lm_head = nn.Linear(64, 128)

    def forward(self, input_ids, positions):
        x = self.embedding(input_ids)
        return self.attention(x, x, x) + x.flip(0)


def headless(vllm_config, parallel_context):
    return Headless()


def written_out(vllm_config, parallel_context):
    return WrittenOut()


def recurrent(vllm_config, parallel_context):
    return Recurrent()


def mixes_tokens(vllm_config, parallel_context):
    return Reversed()


def reads_config(vllm_config, parallel_context):
    return nn.Embedding(vllm_config.model_config.hf_config.width, 8)


def text_of(report, subject):
    return " ".join(found.text for found in report.of(subject))


def test_a_model_of_trainable_attention(model_dir):
    report = examine(model_dir, tiny, **OPTIONS)
    assert report.exit_code == 0, report.to_json()
    parameters = sum(p.numel() for p in TinyModel().parameters())
    assert f"{parameters:,} parameters" in text_of(report, "module")
    assert "2 × TrainableAttention: 2 heads of 32." in text_of(report, "attention")
    assert "input_ids [tokens]" in text_of(report, "call")
    assert "qkv (2)" in text_of(report, "LoRA")
    assert f"{len(TinyModel().state_dict())} tensors" in text_of(report, "live weights")
    assert "Equal bits" in text_of(report, "exact mode")


def test_a_factory_without_a_config_or_weights():
    report = examine(factory=plain_gpt, **OPTIONS)
    assert report.exit_code == 0, report.to_json()
    (config,) = report.of("config.json")
    assert f'"vocab_size": {PlainConfig().vocab_size}' in config.write
    attention = text_of(report, "attention")
    assert "2 × scaled_dot_product_attention: 2 heads of 32, at " in attention
    assert "plain_gpt.py:" in attention
    assert "arange" in text_of(report, "call")
    assert report.of("weights")[0].state == "note"
    assert "use_vllm_attention(module)" in report.of("exact mode")[0].write


def stock(vllm_config, parallel_context):
    return AutoModelForCausalLM.from_config(vllm_config.model_config.hf_config)


def test_half_of_what_the_doctor_needs_is_given(tmp_path):
    """The README's factory without its directory, and the directory without it."""
    (found,) = examine(factory=stock, **OPTIONS).refused
    assert "Unrecognized configuration class" in found.text
    assert len(found.text) < 800  # Transformers lists all of its configs
    assert "the model directory before the factory" in found.write

    config = LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    report = examine(tmp_path, **OPTIONS)
    assert report.exit_code == 0
    (found,) = report.of("registration")
    assert "the factory behind the model directory" in found.write


def test_bytes_of_ranks_are_those_of_the_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(planned_model.CONFIG))
    report = examine(tmp_path, planned, pipeline_parallel_size=3, **OPTIONS)
    assert report.exit_code == 0, report.to_json()
    # What every rank holds whole: the plan does not name it, or its outputs are summed.
    whole = ("norm", "positions", "output_linear.bias", "down.bias")
    of_rank = sum(
        parameter.numel() // (1 if any(part in name for part in whole) else 2)
        for name, parameter in planned_model.PlanModel().named_parameters()
    )
    tensor = text_of(report, "tensor parallel")
    assert f"{of_rank * 4 / 1e3:.1f} kB a rank at size 2" in tensor
    assert "At size 4: PlanModel: " in tensor and "size 8" not in tensor
    sizes = text_of(report, "pipeline parallel").partition("3 stages: ")[2]
    assert sizes.count("kB") == 3


@pytest.mark.parametrize(
    ("factory", "subject", "says"),
    [
        (TinyModel, "config.json", "is a class"),
        (reads_config, "factory", "no attribute 'width'"),
        (headless, "head", "no way from hidden states to logits"),
        (written_out, "call", "return self.lm_head(torch.softmax(scores, -1) @ x)"),
        (recurrent, "call", "tokens depend on other tokens outside attention"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_factory_that_is_refused(factory, subject, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    report = examine(tmp_path, factory, **OPTIONS)
    assert report.exit_code == 1
    assert [found.subject for found in report.refused] == [subject], report.to_json()
    assert says in report.refused[0].text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no file", "config.json cannot be read"),
        ("{", "config.json cannot be read"),
        ({"architectures": []}, "names no architecture"),
        ({"vocab_size": None}, "vocab_size"),
        ({"architectures": ["Nobodys"]}, "Unrecognized model"),
    ],
    ids=str,
)
def test_a_config_that_is_refused(change, says, tmp_path):
    if change != "no file":
        text = change if isinstance(change, str) else json.dumps(CONFIG | change)
        (tmp_path / "config.json").write_text(text)
    factory = None if change == {"architectures": ["Nobodys"]} else tiny
    (found,) = examine(tmp_path, factory, **OPTIONS).refused
    assert found.subject == "config.json" and says in found.text
    wants_registration = factory is None
    assert ('register_model("Nobodys", factory)' in found.write) is wants_registration


def test_weights_that_do_not_fill_the_module(model_dir):
    state = TinyModel().state_dict()
    del state["layers.1.qkv.weight"]
    save_file(state, model_dir / "model.safetensors")
    report = examine(model_dir, tiny, **OPTIONS)
    (found,) = report.refused
    assert found.subject == "loading" and "layers.1.qkv.weight" in found.text
    assert report.of("attention"), "what can be seen all the same is said"


def test_stages_by_a_plan_need_no_declaration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(planned_model.CONFIG))
    report = examine(tmp_path, planned_undeclared, pipeline_parallel_size=3, **OPTIONS)
    (found,) = report.of("pipeline parallel")
    assert found.state == "ok"
    assert found.text.partition("3 stages: ")[2].count("kB") == 3


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_a_layout_that_is_asked_for_without_a_plan(axis, model_dir):
    report = examine(model_dir, tiny, **OPTIONS | {f"{axis}_parallel_size": 2})
    (found,) = report.refused
    assert found.subject == f"{axis} parallel" and "plan" in found.write


def test_nothing_to_examine():
    with pytest.raises(ValueError, match="a model directory or a factory"):
        examine()


@pytest.mark.engine
def test_the_self_check_of_an_engine(tmp_path, fork_server):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = OPTIONS | {"kv_cache_memory_bytes": 1 << 24, "max_num_seqs": 4}
    assert examine(tmp_path, mixes_tokens, **options).exit_code == 0
    report = examine(tmp_path, mixes_tokens, self_check=True, **options)
    (found,) = report.refused
    assert found.subject == "self-check" and "full forward" in found.text
    report = examine(tmp_path, tiny, self_check=True, **options)
    assert report.of("self-check")[0].state == "ok", report.to_json()


def doctor(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", "vllm_generic.doctor", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command(model_dir, tmp_path):
    options = ["--dtype=float32", "--tensor-parallel-size=2", "--json=report.json"]
    done = doctor(str(model_dir), "test_doctor:tiny", *options, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{model_dir}: REFUSED" in done.stdout.replace("\n", "")
    report = json.loads((tmp_path / "report.json").read_text())
    refused = [f["subject"] for f in report["findings"] if f["state"] == "refused"]
    assert refused == ["tensor parallel"] and not report["serves"]


def test_a_command_that_names_nothing(tmp_path):
    done = doctor("nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "expected a directory that exists" in done.stderr
