# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An adapter for a second task, trained and sampled beside the base.

`by_tinker` does it through the LoRA service with Tinker's client, on a model that
Hugging Face's files describe. `by_hooks` does it for any module, by the operator that
`vllm serve` has, too.
"""

from pathlib import Path
from typing import Any, NamedTuple

import tinker
import torch
import torch.nn.functional as F
from chain_logprobs import distance, farthest
from chain_models import Subject
from chain_servers import sample, served, started
from chain_tasks import PROMPT, next_digits, problems, reversed_digits
from tinker import types
from torch import nn

from vllm.lora.adapted_module import AdaptedModule
from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig

HELD_OUT = 16  # problems


class Adapted(NamedTuple):
    """The largest |Δ log p| between trainer and sampler, and what was answered."""

    difference: float
    says: str


def by_tinker(directory: Path, steps: int, lr: float, *options: str) -> Adapted:
    """The service samples by vLLM; `options` are its other ones."""
    command = ["vllm_generic.tink", "serve", str(directory), "--sampler=vllm"]
    command += [f"--root={directory / 'tink'}", "--port=0", "--model-name=stock"]
    command += ["--gpu-memory-utilization=0.3"]
    ready = r"serves .* on (http://\S+),"
    with started([*command, *options], directory / "tink.log", ready) as found:
        client = tinker.ServiceClient(base_url=found[1], api_key="tml-local")
        adapter = client.create_lora_training_client(
            base_model="stock", rank=8
        ).result()
        for step in range(steps):
            data = [_datum(p, next_digits(p)) for p in problems(16, seed=step)]
            passed = adapter.forward_backward(data, "cross_entropy")
            adapter.optim_step(types.AdamParams(learning_rate=lr)).result()
            loss = passed.result().metrics["loss:sum"] / (len(data) * PROMPT)
        adapted = adapter.save_weights_and_get_sampling_client().result()
        base = client.create_sampling_client(base_model="stock").result()
        prompts = problems(HELD_OUT, seed=10**6)
        trained = adapter.forward(
            [_datum(p, next_digits(p)) for p in prompts], "cross_entropy"
        )
        worst = 0.0
        for prompt, output in zip(
            prompts, trained.result().loss_fn_outputs, strict=True
        ):
            ids = types.ModelInput.from_ints(prompt + next_digits(prompt))
            sampled = adapted.compute_logprobs(ids).result()[1:]
            ours = torch.tensor(output["logprobs"].data)
            worst = max(worst, distance(ours, sampled))
        answers = {
            name: [_greedy(sampler, prompt) for prompt in prompts]
            for name, sampler in (("adapter", adapted), ("base", base))
        }
        client.close("success").result()
    return Adapted(worst, _said(loss, prompts, answers["adapter"], answers["base"]))


def _datum(prompt: list[int], answer: list[int]) -> types.Datum:
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def _greedy(sampler: Any, prompt: list[int]) -> list[int]:
    params = types.SamplingParams(max_tokens=PROMPT, temperature=0.0)
    ids = types.ModelInput.from_ints(prompt)
    future = sampler.sample(ids, num_samples=1, sampling_params=params)
    return future.result().sequences[0].tokens


class WithAdapter(nn.Module):
    """A model that is called as before, with an adapter's outputs in its layers."""

    def __init__(self, model: nn.Module, config: AdapterConfig) -> None:
        super().__init__()
        self.model = model
        self._adapted = AdaptedModule(model)
        adapter = Adapter.start(config, self._adapted.sites, seed=0)
        self.adapter = adapter.for_training(self._adapted.device)

    def forward(self, tokens: torch.Tensor, **arguments: Any) -> Any:
        rows = torch.zeros(tokens.numel(), dtype=torch.int64)  # all have the adapter
        with self._adapted.active([self.adapter], rows):
            return self.model(tokens, **arguments)


def by_hooks(
    subject: Subject, model: nn.Module, directory: Path, steps: int, ranks: int
) -> Adapted:
    """`directory` has the weights of `model`."""
    adapted = WithAdapter(model, AdapterConfig(rank=8, alpha=32))
    factors = adapted.adapter.parameters()
    optimizer = torch.optim.AdamW(factors, lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        prompts = problems(16, seed=step)
        tokens = torch.tensor([p + next_digits(p) for p in prompts])
        tokens = tokens.to(next(model.parameters()).device)
        logits = subject.logits(adapted, tokens)[:, PROMPT - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.adapter.save(directory / "adapter")
    options = ["--enable-lora", "--max-lora-rank=8"]
    options += ["--lora-modules", f"adapter={directory / 'adapter'}"]
    with served(subject, directory, ranks, *options) as url:
        prompts = problems(HELD_OUT, seed=10**6)
        rows = {
            name: [sample(url, prompt, 1, 0.0, name)[0] for prompt in prompts]
            for name in ("adapter", "stock")
        }
    worst = farthest(subject, adapted, rows["adapter"])
    worst = max(worst, farthest(subject, model, rows["stock"]))
    answers = {name: [row["answer"] for row in found] for name, found in rows.items()}
    says = _said(loss.item(), prompts, answers["adapter"], answers["stock"])
    return Adapted(worst, says)


def _said(
    loss: float,
    prompts: list[list[int]],
    adapters: list[list[int]],
    bases: list[list[int]],
) -> str:
    """`adapters` and `bases` are the answers."""
    pairs = zip(prompts, adapters, bases, strict=True)
    right = [(next_digits(p) == a, reversed_digits(p) == b) for p, a, b in pairs]
    by_adapter, by_base = (sum(column) for column in zip(*right, strict=True))
    return (
        f"loss {loss:.2f}; right: {by_adapter} of {len(prompts)} by the adapter, "
        f"{by_base} beside it by the base"
    )
