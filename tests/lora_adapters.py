# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters with values, and an engine's log-probabilities beside a trainer's."""

from collections.abc import Mapping, Sequence

import torch

from vllm import LLM, SamplingParams
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer, TrainingSequence
from vllm.lora.request import LoRARequest

GREEDY = SamplingParams(
    temperature=0,
    max_tokens=6,
    logprobs=0,
    prompt_logprobs=0,
    ignore_eos=True,
    detokenize=False,
)


def add(trainer: AdapterTrainer, name: str, config: AdapterConfig, seed: int) -> None:
    """Train an adapter `name` whose factors have values that matter."""
    adapter = trainer.add(name, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))


def sequences(name: str | None, *lengths: int, seed: int = 0) -> list[TrainingSequence]:
    """Random ones, of a vocabulary of 128."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        tokens = torch.randint(128, (length + 1,), generator=generator)
        made.append(TrainingSequence(name, tokens[:-1], tokens[1:]))
    return made


def difference(
    llm: LLM,
    trainer: AdapterTrainer,
    prompts: Sequence[list[int]],
    names: Sequence[str | None],
    requests: Mapping[str, LoRARequest],
) -> float:
    """Max |Δ log p| over prompts and samples, the prompt at i with adapter names[i]."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        GREEDY,
        lora_request=[None if name is None else requests[name] for name in names],
        use_tqdm=False,
    )
    batch, served = [], []
    for output, name in zip(outputs, names, strict=True):
        [completion] = output.outputs
        tokens = [*output.prompt_token_ids, *completion.token_ids]
        positions = [*output.prompt_logprobs[1:], *completion.logprobs]
        pairs = zip(positions, tokens[1:], strict=True)
        served.append(torch.tensor([values[t].logprob for values, t in pairs]))
        ids = torch.tensor(tokens)
        batch.append(TrainingSequence(name, ids[:-1], ids[1:]))
    trained = trainer.forward(batch)
    pairs = zip(served, trained, strict=True)
    return max(float((a - b.cpu()).abs().max()) for a, b in pairs)
