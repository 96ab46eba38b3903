# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters of experts whose weights are one parameter, as Transformers has them.

PEFT is the reference: its `target_parameters`, its products and its files.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import sequences
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from stacked_experts import SIZES, Model, gpt_oss_block, mixtral_block, square_block
from tiny_model import HIDDEN
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from vllm import ModelRegistry, SamplingParams
from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer
from vllm.lora.mixtures import mixtures_of
from vllm.lora.request import LoRARequest
from vllm.lora.site_hooks import BatchRows, SiteHook
from vllm.lora.sites import find_sites, targets_of
from vllm.model_executor.parallel_context import ParallelContext

STACKS = ["experts.down_proj", "experts.gate_up_proj"]


def peft_of(model: nn.Module, rank: int, **options: Any) -> nn.Module:
    """A copy of the model with an adapter of PEFT's that changes something."""
    config = LoraConfig(r=rank, lora_alpha=8, target_parameters=STACKS, **options)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return wrapped


def ours_of(wrapped: nn.Module) -> Adapter:
    config = wrapped.peft_config["default"].to_dict()
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return Adapter.from_peft(config, {name: t.clone() for name, t in state.items()})


@pytest.mark.parametrize("block", [mixtral_block, square_block, gpt_oss_block])
def test_equals_peft(block: Any) -> None:
    """Two adapters and rows without one in a batch: values, and gradients of one."""
    torch.manual_seed(0)
    model = Model(block())
    names = [name for name, _ in model.named_parameters()]
    first = peft_of(model, 4, target_modules=["qkv"])
    second = peft_of(
        model, 2, target_modules=[], alpha_pattern={"experts.down_proj": 3}
    )
    trainer = AdapterTrainer(model, packed=True)
    trainer.add("a", ours_of(first))
    trainer.add("b", ours_of(second))
    batch = [s for name in ("a", None, "b") for s in sequences(name, 9, 4)]
    found = trainer.forward_backward(batch, lambda _, lp: -torch.cat(lp).sum())

    references = {"a": first, "b": second, None: model}
    for sequence, values in zip(batch, found, strict=True):
        reference = references[sequence.adapter]
        positions = torch.arange(len(sequence.tokens))
        base = reference.get_base_model() if sequence.adapter else reference
        logits = base.lm_head(reference(sequence.tokens, positions))
        log_probs = logits.log_softmax(-1)
        expected = log_probs.gather(1, sequence.targets.view(-1, 1)).squeeze(1)
        torch.testing.assert_close(values, expected.detach(), rtol=1e-6, atol=1e-5)
        if sequence.adapter is not None:
            (-expected.sum()).backward()
    for name, reference in (("a", first), ("b", second)):
        for parameter in reference.parameters():
            parameter.data = (
                torch.zeros(()) if parameter.grad is None else (parameter.grad)
            )
        gradients = get_peft_model_state_dict(reference, save_embedding_layers=False)
        adapter = trainer.adapters[name]
        for pair in adapter.factors.values():
            for factor in pair:
                factor.data = factor.grad
        found_gradients = adapter.state_dict()
        assert found_gradients.keys() == gradients.keys()
        for key, value in gradients.items():
            assert value.any()
            # An element of float32 sums may be small beside what was added to it.
            error = (found_gradients[key] - value).norm() / value.norm()
            assert error < 1e-5, key
    assert [name for name, _ in model.named_parameters()] == names
    assert not vars(model.mlp.experts).keys() & {"gate_up_proj", "down_proj"}


def test_files_of_peft(tmp_path: Path) -> None:
    """They keep their names and values, and PEFT loads what is written here."""
    torch.manual_seed(0)
    model = Model(square_block())
    wrapped = peft_of(model, 4, target_modules=["qkv"])
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    trainer = AdapterTrainer(model)
    adapter = trainer.add("a", ours_of(wrapped))
    assert {n for n in adapter.factors if "experts" in n} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"mlp.{name}" for name in STACKS]
    other = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=1, target_modules=["qkv"])
    )
    other.load_adapter(str(tmp_path), "ours")
    found = get_peft_model_state_dict(
        other, adapter_name="ours", save_embedding_layers=False
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = Adapter.load(tmp_path).named_as(trainer.sites)
    trainer.set_factors("a", again)


def test_targets() -> None:
    sites = find_sites(Model(mixtral_block()), ParallelContext())
    config = AdapterConfig(2, target_modules=(), target_parameters=tuple(STACKS))
    assert [site.own_name for site in targets_of(config, sites)] == [
        "gate_up_proj",
        "down_proj",
    ]
    adapter = Adapter.start(config, sites, seed=0)
    a, b = adapter.factors["mlp.experts.gate_up_proj"]
    assert a.shape == (6, HIDDEN) and b.shape == (6, 96)
    assert all(not site.experts for site in targets_of(AdapterConfig(2), sites))
    with pytest.raises(ValueError, match=r"experts\.w1.*mlp\.experts\.gate_up_proj"):
        targets_of(AdapterConfig(2, target_parameters=("experts.w1",)), sites)


@torch.no_grad()
def test_a_block_is_called_once_unless_an_adapter_changes_its_experts() -> None:
    model = Model(mixtral_block())
    sites = find_sites(model, ParallelContext())
    rows = BatchRows(torch.tensor([0, 1, 0]), tokens=3)
    hooks = {name: SiteHook(site, rows) for name, site in sites.items()}
    for hook in hooks.values():
        hook.slots.ranks = torch.zeros(2, dtype=torch.int32)
    mixture = mixtures_of(model, hooks, rows)["mlp"]
    mixture.attach()
    calls: list[int] = []
    model.mlp.gate.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    layers = AdapterConfig(2, target_modules=("qkv",))
    experts = AdapterConfig(2, target_modules=(), target_parameters=tuple(STACKS))
    for configs, expected in (([layers, layers], 1), ([layers, experts], 2)):
        calls.clear()
        mixture.look_at([Adapter.start(config, sites) for config in configs])
        model.mlp(torch.randn(1, 3, HIDDEN))
        assert len(calls) == expected


def mixtral(directory: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = MixtralConfig(**SIZES | sizes, architectures=["MixtralForCausalLM"])
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(directory)  # a matrix for each expert
    return model


@pytest.mark.engine
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_samples_peft_adapters(
    start: Any, tmp_path: Path, ranks: int
) -> None:
    """Transformers' Mixtral as it stands; two adapters and none in one batch.

    Two ranks have a part of each expert, by Transformers' own plan.
    """
    model = mixtral(tmp_path / "model")
    ModelRegistry.register_model(
        "MixtralForCausalLM",
        lambda vllm_config, parallel_context: MixtralForCausalLM(
            vllm_config.model_config.hf_config
        ),
    )
    references: list[nn.Module] = [model]
    requests: list[LoRARequest | None] = [None]
    for number, rank in ((1, 4), (2, 2)):
        wrapped = peft_of(model, rank, target_modules=["q_proj"]).eval()
        wrapped.save_pretrained(tmp_path / str(number))
        references.append(wrapped)
        requests.append(LoRARequest(str(number), number, str(tmp_path / str(number))))
    llm = start(
        processes=ranks > 1,
        model=str(tmp_path / "model"),
        tensor_parallel_size=ranks,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
    )
    prompts = [torch.randint(64, (n,)).tolist() for n in (9, 14, 11)]
    params = SamplingParams(
        temperature=0, max_tokens=6, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts],
        params,
        lora_request=requests,
        use_tqdm=False,
    )
    for reference, prompt, output in zip(references, prompts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_probs = reference(tokens).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, tokens[0, 1:, None]).squeeze(1)
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found = [
            step[token].logprob
            for step, token in zip(steps, tokens[0, 1:].tolist(), strict=True)
        ]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
