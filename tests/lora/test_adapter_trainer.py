# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training of many adapters at once, against PEFT and against each adapter alone."""

import copy

import pytest
import torch
from lora_adapters import sequences
from tiny_model import TinyModel, trained_model

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdamWParams, AdapterTrainer, TrainingSequence

TARGETS = ("qkv", "projection", "lm_head")


def base() -> TinyModel:
    model = trained_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    return model


def cross_entropy(indices: list[int], log_probs: list[torch.Tensor]) -> torch.Tensor:
    return -torch.cat(log_probs).sum()


def with_values(trainer: AdapterTrainer, name: str, seed: int) -> None:
    """Values for B, which begins as zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in trainer.adapters[name].parameters():
            factor.normal_(std=0.05, generator=generator)


def trained(
    name: str, rank: int, others: bool, packed: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probabilities and factors after two steps, alone or among others."""
    trainer = AdapterTrainer(base(), packed=packed)
    ranks = {"a": 4, "b": 8, "c": 16} if others else {name: rank}
    for other, size in ranks.items():
        trainer.add(other, AdapterConfig(size, target_modules=TARGETS), seed=size)
        with_values(trainer, other, size)
    each = [sequences(n, 5, 12, 9, seed=size) for n, size in ranks.items()]
    batch = [sequence for turn in zip(*each, strict=True) for sequence in turn]
    if others:
        batch += sequences(None, 7)
    for _ in range(2):
        log_probs = trainer.forward_backward(batch, cross_entropy)
        for other in ranks:
            trainer.step(other, AdamWParams(1e-2, grad_clip_norm=1.0))
    mine = {
        int(sequence.tokens.sum()): values
        for sequence, values in zip(batch, log_probs, strict=True)
        if sequence.adapter == name
    }
    return [mine[key] for key in sorted(mine)], trainer.adapters[name].parameters()


@pytest.mark.parametrize("name, rank", [("a", 4), ("c", 16)])
def test_the_bits_of_an_adapter_alone(name, rank):
    alone, among = trained(name, rank, others=False), trained(name, rank, others=True)
    for mine, theirs in zip(alone, among, strict=True):
        assert mine and all(map(torch.equal, mine, theirs))


def test_one_pass_over_all_adapters():
    alone = trained("b", 8, others=False)
    among = trained("b", 8, others=True, packed=True)
    for mine, theirs in zip(alone, among, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_against_peft(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = AdapterTrainer(base())
    config = AdapterConfig(
        8,
        16,
        target_modules=(*TARGETS, "embedding"),
        rank_pattern={"layers.1.qkv": 4},
        alpha_pattern={"projection": 6.0},
        use_rslora=True,
    )
    trainer.add("a", config, seed=3)
    with_values(trainer, "a", 5)
    [sequence] = sequences("a", 11)
    [log_probs] = trainer.forward_backward([sequence], cross_entropy)
    trainer.adapters["a"].save(tmp_path)

    reference = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    reference = reference.double()
    with torch.no_grad():
        reference.eval()
    hidden = reference.base_model.model(sequence.tokens, torch.arange(11))
    logits = reference.base_model.model.lm_head(hidden)
    expected = logits.log_softmax(-1).gather(1, sequence.targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-5)
    (-expected.sum()).backward()
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    own = copy.copy(trainer.adapters["a"])
    own.factors = {n: (a.grad, b.grad) for n, (a, b) in own.factors.items()}
    mine = own.state_dict()
    assert mine.keys() == gradients.keys()
    for name, gradient in mine.items():
        error = (gradient.double() - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, name


def test_nothing_of_the_base_changes():
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(part) for part in model.modules()]
    trainer = AdapterTrainer(model)
    trainer.add("a", AdapterConfig(4), seed=0)
    batch = sequences("a", 6) + sequences(None, 6)
    trainer.forward_backward(batch, cross_entropy)
    trainer.step("a", AdamWParams())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)
    assert [type(part) for part in model.modules()] == classes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_base_sequences_have_the_bits_of_the_base():
    tokens = sequences(None, 9)[0].tokens
    expected = base()
    with torch.no_grad():
        logits = expected.lm_head(expected(tokens, torch.arange(9)))
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    trainer = AdapterTrainer(base(), packed=False)
    trainer.add("a", AdapterConfig(4, target_modules=TARGETS), seed=0)
    with_values(trainer, "a", 1)
    batch = [*sequences("a", 5), TrainingSequence(None, tokens, tokens)]
    assert torch.equal(trainer.forward(batch)[1], expected)


def test_several_targets_for_a_token():
    trainer = AdapterTrainer(base())
    trainer.add("a", AdapterConfig(4), seed=0)
    [sequence] = sequences("a", 6)
    both = torch.stack([sequence.targets, sequence.tokens], 1)
    [one] = trainer.forward([sequence])
    [two] = trainer.forward([TrainingSequence("a", sequence.tokens, both)])
    assert two.shape == (6, 2) and torch.equal(two[:, 0], one)


def test_a_checkpoint_continues_with_the_same_bits(tmp_path):
    batch = sequences("a", 6, 9)

    def steps(trainer, number):
        for _ in range(number):
            trainer.forward_backward(batch, cross_entropy)
            trainer.step("a", AdamWParams(1e-2))

    straight = AdapterTrainer(base())
    straight.add("a", AdapterConfig(4), seed=0)
    steps(straight, 4)
    first = AdapterTrainer(base())
    first.add("a", AdapterConfig(4), seed=0)
    steps(first, 2)
    first.adapters["a"].save(tmp_path)
    first.save_optimizer("a", tmp_path)
    second = AdapterTrainer(base())
    second.add("a", Adapter.load(tmp_path))
    second.load_optimizer("a", tmp_path)
    steps(second, 2)
    pairs = straight.adapters["a"].factors
    assert pairs.keys() == second.adapters["a"].factors.keys()
    for name, pair in pairs.items():
        assert all(map(torch.equal, pair, second.adapters["a"].factors[name]))


def test_forward_leaves_gradients():
    trainer = AdapterTrainer(base())
    adapter = trainer.add("a", AdapterConfig(4), seed=0)
    trainer.forward(sequences("a", 6))
    assert all(factor.grad is None for factor in adapter.parameters())
    with pytest.raises(KeyError, match="There is no adapter 'b'"):
        trainer.forward(sequences("b", 6))
