# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters of registered callables in an engine, against the trainer's."""

import dataclasses
import json
from types import SimpleNamespace

import lora_adapters as adapters
import pytest
import torch
from layout_models import (
    CONFIG,
    build_dtensor,
    build_megatron,
    build_parallel,
    build_plain,
    build_planned,
)
from safetensors.torch import load_file, save_file
from tiny_model import TinyModel

from vllm import ModelRegistry
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer
from vllm.lora.request import LoRARequest
from vllm.lora.shared_adapters import SharedAdapters

pytestmark = pytest.mark.engine

PROMPTS = [[1, 2, 3], list(range(40)), [7], [9, 8, 7, 6], [5] * 33]
NAMES = ["a", None, "b", "a", "c"]
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}


def scale_down(model: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(by)


def names_and_classes(model):
    """Of each parameter, and of the layer that it lies in."""
    return {
        name: type(model.get_submodule(name.rpartition(".")[0])).__name__
        for name in model.state_dict()
    }


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_adapters_of_a_plain_module(start, model_dir, tmp_path):
    """One engine, in turn: a mixed batch, more adapters than slots, replacement,
    adapters from memory, new weights below live adapters, and errors."""
    base = TinyModel()
    weights = load_file(model_dir / "model.safetensors")
    weights = {name: 0.2 * value for name, value in weights.items()}
    save_file(weights, model_dir / "model.safetensors")
    base.load_state_dict(weights)
    trainer = AdapterTrainer(base)
    configs = {
        "a": AdapterConfig(4, target_modules=("qkv", "lm_head", "embedding")),
        "b": AdapterConfig(8, use_rslora=True, rank_pattern={"layers.1.qkv": 3}),
        "c": AdapterConfig(16, 4.0, target_modules=r"layers\.\d\.projection|lm_head"),
        "d": AdapterConfig(16, target_modules=("lm_head",)),
    }
    requests = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        adapters.add(trainer, name, config, number)
        trainer.adapters[name].save(tmp_path / name)
        requests[name] = LoRARequest(name, number, str(tmp_path / name))
    ModelRegistry.register_model("TinyModel", lambda config, context: TinyModel())
    llm = start(enable_prefix_caching=True, max_cpu_loras=4, **LORA)
    engine = llm.llm_engine

    def difference(names=NAMES):
        return adapters.difference(llm, trainer, PROMPTS, names, requests)

    assert llm.apply_model(names_and_classes) == [names_and_classes(base)]
    [before] = llm.apply_model(tensors)
    assert difference() < 1e-4
    assert engine.list_loras() == {1, 2, 3}
    assert difference(["d", "a", "b", "a", None]) < 1e-4  # one makes room for it
    assert difference(["c", "d", "d", "b", "a"]) < 1e-4  # more than there are slots
    assert engine.list_loras() == {1, 2, 3, 4}
    [after] = llm.apply_model(tensors)
    assert all(torch.equal(before[name], after[name]) for name in before)

    # Replaced in place, under the same path, after prefixes were cached.
    adapters.add(trainer, "other a", configs["a"], 9)
    trainer.set_factors("a", trainer.adapters["other a"])
    trainer.adapters["a"].save(tmp_path / "a")
    assert difference(["a"] * 5) > 1e-2
    assert engine.add_lora(LoRARequest("a", 1, str(tmp_path / "a"), load_inplace=True))
    assert difference(["a"] * 5) < 1e-4

    # From memory.
    shared = SharedAdapters()
    requests["a"] = shared.put(trainer.adapters["other a"], "a in memory", 11)
    assert difference(["a", None, "c", "a", "a"]) < 1e-4
    assert 11 in engine.list_loras()
    shared.drop(requests["a"])
    shared.close()
    assert not shared.folder.exists()

    # New weights by name, below live adapters.
    scale_down(base, 0.9)
    save_file(base.state_dict(), model_dir / "model.safetensors")
    live = engine.list_loras()
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    assert engine.list_loras() == live
    assert difference(["a", None, "c", "b", "a"]) < 1e-4

    assert engine.pin_lora(2) and engine.remove_lora(11)
    assert 11 not in engine.list_loras() and not engine.remove_lora(11)
    with pytest.raises(LoRAAdapterNotFoundError, match="nowhere"):
        engine.add_lora(LoRARequest("nowhere", 20, str(tmp_path / "nowhere")))
    adapters.add(trainer, "wide", AdapterConfig(32, target_modules=("qkv",)), 1)
    trainer.adapters["wide"].save(tmp_path / "wide")
    with pytest.raises(ValueError, match="has rank 32 for layers.0.qkv; expected at m"):
        engine.add_lora(LoRARequest("wide", 21, str(tmp_path / "wide")))
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    config_file = tmp_path / "c" / "adapter_config.json"
    config_file.write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="has use_dora=True, which is not taken"):
        engine.add_lora(LoRARequest("dora", 22, str(tmp_path / "c")))
    assert engine.list_loras() & {20, 21, 22} == set()


KINDS = {
    "plan": build_planned,
    "vllm layers": build_parallel,
    "dtensor": build_dtensor,
    "megatron": build_megatron,
}


class ReadsOtherNames(TinyModel):
    """Another framework writes its adapters, and calls a projection `o_proj`."""

    def read_adapter(self, adapter):
        pairs = adapter.factors.items()
        factors = {name.replace("o_proj", "projection"): pair for name, pair in pairs}
        config = dataclasses.replace(adapter.config, target_modules=tuple(factors))
        return Adapter(config, factors)


def test_a_module_reads_adapters_of_other_names(start, model_dir, tmp_path):
    base = TinyModel()
    base.load_state_dict(load_file(model_dir / "model.safetensors"))
    scale_down(base, 0.2)
    save_file(base.state_dict(), model_dir / "model.safetensors")
    trainer = AdapterTrainer(base)
    adapters.add(trainer, "a", AdapterConfig(4, target_modules="all-linear"), 1)
    own = trainer.adapters["a"].copy()
    pairs = own.factors.items()
    theirs = {name.replace("projection", "o_proj"): pair for name, pair in pairs}
    assert theirs.keys() != own.factors.keys()
    config = dataclasses.replace(own.config, target_modules=tuple(theirs))
    Adapter(config, theirs).save(tmp_path / "a")
    ModelRegistry.register_model("TinyModel", lambda config, context: ReadsOtherNames())
    llm = start(**LORA)
    requests = {"a": LoRARequest("a", 1, str(tmp_path / "a"))}
    names = ["a", None, "a", "a", None]
    assert adapters.difference(llm, trainer, PROMPTS, names, requests) < 1e-4


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("plan", {"tensor_parallel_size": 2}),
        pytest.param(
            "vllm layers", {"tensor_parallel_size": 2}, marks=pytest.mark.slow
        ),
        pytest.param("dtensor", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("megatron", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("vllm layers", {}, marks=pytest.mark.slow),
        pytest.param("megatron", {}, marks=pytest.mark.slow),
        pytest.param("plan", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("megatron", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(
            "vllm layers", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_layouts(start, tmp_path, kind, layout):
    if kind == "megatron":
        pytest.importorskip("megatron.core")
    config = {**CONFIG, "architectures": ["LayoutModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    base = build_plain(SimpleNamespace(**CONFIG))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.1, generator=generator)
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    ModelRegistry.register_model("LayoutModel", KINDS[kind], supports_pp=True)
    trainer = AdapterTrainer(base)
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down", "lm_head")
    configs = {
        "a": AdapterConfig(4, target_modules=(*everything, "embedding")),
        "b": AdapterConfig(8),
        "c": AdapterConfig(16, target_modules=("down", "lm_head")),
    }
    requests = {}
    for number, (name, adapter_config) in enumerate(configs.items(), 1):
        adapters.add(trainer, name, adapter_config, number)
        trainer.adapters[name].save(tmp_path / name)
        requests[name] = LoRARequest(name, number, str(tmp_path / name))
    llm = start(model=str(tmp_path), **LORA, **layout)
    assert adapters.difference(llm, trainer, PROMPTS, NAMES, requests) < 1e-4
