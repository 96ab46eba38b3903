# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters' configs and files, against PEFT's."""

import json

import pytest
import torch
from lora_adapters import sequences
from tiny_model import TinyModel
from torch import nn

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer
from vllm.lora.sites import find_sites, targets_of
from vllm.model_executor.parallel_context import ParallelContext

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def sites(model=None):
    return find_sites(model or TinyModel(), ParallelContext())


@pytest.mark.parametrize(
    "targets",
    [
        ["qkv", "lm_head"],
        ["layers.1.qkv"],
        r".*\.(qkv|projection)",
        r"layers\.0\..*v|embedding",
        "all-linear",
    ],
)
def test_targets_are_those_of_peft(targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets)
    if targets == "all-linear":  # PEFT knows the head of transformers' models only
        config.exclude_modules = ["lm_head"]
    model = peft.inject_adapter_in_model(config, TinyModel())
    theirs = {n.partition(".lora_")[0] for n in model.state_dict() if ".lora_" in n}
    ours = targets if isinstance(targets, str) else tuple(targets)
    chosen = targets_of(AdapterConfig(4, target_modules=ours), sites())
    assert {site.name for site in chosen} == theirs


def test_patterns_are_those_of_peft():
    peft = pytest.importorskip("peft")
    patterns = {
        "rank_pattern": {"layers.1.qkv": 2, "projection": 6, r".*\.0\.qkv": 3},
        "alpha_pattern": {"qkv": 5},
    }
    for rslora in (False, True):
        options = {"use_rslora": rslora, **patterns}
        config = peft.LoraConfig(r=4, target_modules="all-linear", **options)
        ours = AdapterConfig.from_peft(config.to_dict())
        model = peft.inject_adapter_in_model(config, TinyModel())
        assert ours == AdapterConfig(4, 8, use_rslora=rslora, **patterns)
        for name, part in model.named_modules():
            if hasattr(part, "scaling"):
                assert ours.rank_of(name) == part.r["default"]
                assert ours.scale_of(name) == part.scaling["default"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("peft_type", "IA3"),
    ],
)
def test_what_is_not_taken_is_named(key, value):
    with pytest.raises(ValueError, match=f"has {key}=.* not taken"):
        AdapterConfig.from_peft(PLAIN | {key: value})


def test_layers_that_peft_chose_by_number():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv"], layers_to_transform=[1])
    module = nn.ModuleDict({"model": TinyModel()})
    model = peft.get_peft_model(module, config)
    adapter = Adapter.from_peft(
        model.peft_config["default"].to_dict(), peft.get_peft_model_state_dict(model)
    )
    name = "model.layers.1.qkv"
    assert list(adapter.factors) == [name]
    assert adapter.config.to_peft(adapter.factors)["target_modules"] == [name]


def test_tensors_that_are_not_taken_are_named():
    a, b = torch.zeros(8, 4), torch.zeros(4, 8)
    pair = {
        "base_model.model.x.lora_A.weight": a,
        "base_model.model.x.lora_B.weight": b,
    }
    for name in ("x.lora_magnitude_vector", "head.weight", "y.lora_A.weight"):
        with pytest.raises(
            ValueError, match=f"{name.partition('.lora_A')[0]}, which is"
        ):
            Adapter.from_peft(PLAIN, pair | {f"base_model.model.{name}": a})


@pytest.mark.parametrize(
    "name, shapes, message",
    [
        ("layers.7.qkv", (64, 192), "changes layers.7.qkv, which is no linear layer"),
        ("layers.0.norm", (64, 64), "changes layers.0.norm, which is no linear layer"),
        (
            "layers.0.qkv",
            (64, 64),
            r"\[8, 64\] and \[64, 8\]; expected \[8, 64\] and \[",
        ),
    ],
)
def test_adapters_that_do_not_fit(name, shapes, message):
    factors = {name: tuple(torch.zeros(8, width) for width in shapes)}
    with pytest.raises(ValueError, match=message):
        Adapter(AdapterConfig(8), factors).check_fits(sites())


def test_targets_that_do_not_exist():
    for targets in (("qkv", "gate_proj"), "nothing.*"):
        config = AdapterConfig(4, target_modules=targets)
        with pytest.raises(ValueError, match="gate_proj|nothing"):
            targets_of(config, sites())


def test_experts_are_none_of_the_sites():
    """They get some tokens only, in an order of their own."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(4, 2)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    assert list(sites(Mixture())) == ["router"]


def test_layers_that_get_some_rows_only():
    class Last(TinyModel):
        def forward(self, input_ids, positions):
            hidden_states = super().forward(input_ids, positions)
            return hidden_states + self.layers[0].projection(hidden_states[-1:])

    trainer = AdapterTrainer(Last())
    trainer.add("a", AdapterConfig(4), seed=0)

    with pytest.raises(
        RuntimeError, match="layers.0.projection was called with 1 rows"
    ):
        trainer.forward(sequences("a", 6))


def test_the_same_seed_gives_the_same_values(tmp_path):
    config = AdapterConfig(4, target_modules=("qkv", "embedding"))
    first, second = (Adapter.start(config, sites(), seed=3) for _ in range(2))
    other = Adapter.start(config, sites(), seed=4)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
    first.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.config.rank == 4 and loaded.embeddings == {"embedding"}
    assert loaded.factors.keys() == first.factors.keys()
    for name, pair in first.factors.items():
        assert all(map(torch.equal, pair, loaded.factors[name]))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
