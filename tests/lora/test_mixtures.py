# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters of experts, which get some of a batch's tokens in an order of their own."""

import copy

import pytest
import torch
from lora_adapters import add, sequences
from tiny_model import HIDDEN, TinyModel, trained_model
from torch import nn

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer
from vllm.lora.mixtures import mixtures_of
from vllm.lora.site_hooks import BatchRows, SiteHook, Slots
from vllm.lora.sites import find_sites
from vllm.model_executor.parallel_context import ParallelContext


class Mixture(nn.Module):
    """Two of three experts for each token; also returns the router's logits."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        self.axes = axes
        self.router = nn.Linear(HIDDEN, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dim() == self.axes
        flat = x.view(-1, HIDDEN)
        logits = self.router(flat)
        weights, chosen = logits.softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape), logits


class Model(TinyModel):
    def __init__(self, axes: int) -> None:
        super().__init__()
        self.load_state_dict(trained_model().state_dict(), strict=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.3)
        self.mixture = Mixture(axes)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = super().forward(input_ids, positions)
        rows = x if self.mixture.axes == 2 else x.unsqueeze(0)
        out, logits = self.mixture(rows)
        assert out.shape == rows.shape and len(logits) == len(x)
        return x + out.view(x.shape) + logits.sum(-1, keepdim=True)


def merged(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with the adapter's products added to its weights."""
    model = copy.deepcopy(model)
    for name, (a, b) in adapter.factors.items():
        weight = model.get_submodule(name).weight
        weight.data += adapter.config.scale_of(name) * b.detach().t() @ a.detach()
    return model


@pytest.mark.parametrize("axes", [2, 3])
def test_a_batch_of_several_adapters(axes: int) -> None:
    torch.manual_seed(0)
    model = Model(axes)
    trainer = AdapterTrainer(model, packed=True)
    names = [f"mixture.experts.{number}" for number in range(3)]
    add(trainer, "a", AdapterConfig(4, target_modules=("qkv", *names)), 1)
    add(trainer, "b", AdapterConfig(2, target_modules=("router", "experts.1")), 2)
    batch = [s for name in ("a", None, "b") for s in sequences(name, 9, 4)]
    found = trainer.forward_backward(batch, lambda _, lp: -torch.cat(lp).sum())
    gradients = [p.grad.clone() for p in trainer.adapters["a"].parameters()]
    trainer.clear_gradients("a")
    trainer.forward_backward(batch[:2], lambda _, lp: -torch.cat(lp).sum())
    alone = [p.grad for p in trainer.adapters["a"].parameters()]
    assert sum(bool(mine.any()) for mine in gradients) > len(gradients) // 2
    for mine, other in zip(gradients, alone, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for sequence, values in zip(batch, found, strict=True):
        plain = model
        if sequence.adapter is not None:
            plain = merged(model, trainer.adapters[sequence.adapter])
        plain_trainer = AdapterTrainer(plain)
        [expected] = plain_trainer.forward(
            [type(sequence)(None, sequence.tokens, sequence.targets)]
        )
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
    assert "forward" not in vars(model.mixture)


@torch.no_grad()
def test_rows_of_an_engine() -> None:
    """Its slots are a stack, its rows a tensor of more than the batch's tokens."""
    torch.manual_seed(0)
    block = Mixture()
    module = nn.ModuleDict({"mixture": block})
    sites = find_sites(module, ParallelContext())
    assert {site.mixture for site in sites.values()} == {None, "mixture"}
    rows = BatchRows(torch.full((16,), -1, dtype=torch.int32), tokens=5)
    factors, hooks = {}, {}
    for name, site in sites.items():
        factors[name] = torch.randn(2, 2, HIDDEN) * 0.1, torch.randn(2, 2, site.outputs)
        slots = Slots(*factors[name], torch.tensor([2, 2]), torch.tensor([1.0, 0.5]))
        hooks[name] = SiteHook(site, rows)
        hooks[name].slots = slots
        hooks[name].attach()
    (mixture,) = mixtures_of(module, hooks, rows).values()
    mixture.attach()
    x = torch.randn(5, HIDDEN)
    rows.slots[:5] = torch.tensor([1, -1, 0, 1, 0])
    found, _ = block(x)
    rows.any_adapter.fill_(False)
    torch.testing.assert_close(block(x)[0][1], found[1])
    for row, slot in enumerate([1, -1, 0, 1, 0]):
        if slot >= 0:
            reference = Mixture()
            reference.load_state_dict(block.state_dict())
            for name, (a, b) in factors.items():
                weight = reference.get_submodule(name.removeprefix("mixture.")).weight
                weight += [1.0, 0.5][slot] * b[slot].t() @ a[slot]
            torch.testing.assert_close(found[row], reference(x[row : row + 1])[0][0])
    with pytest.raises(RuntimeError, match="mixture was called with 3 rows in a batch"):
        rows.any_adapter.fill_(True)
        block(x[:3])
