# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A module as an engine would run it, in steps with cached keys, without an engine."""

import torch
from torch import nn

from vllm.model_executor.models.adapter import Adapter
from vllm.model_executor.models.adapter.calls import AttentionCall, attention
from vllm.model_executor.models.adapter.full_forward import full_forward
from vllm.model_executor.models.adapter.library_attention import show_attention
from vllm.model_executor.models.adapter.seen import Seen, run_routed, see
from vllm.model_executor.models.adapter.sites import PathHooks
from vllm.model_executor.models.adapter.tables import Tables
from vllm.model_executor.models.adapter.trial import SeenAttention

VOCAB = 256
# Of a small model of Transformers.
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    head_dim=16,  # the CPU's attention has 32
)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
CPU = torch.device("cpu")


class CachedAttention:
    """Attends as `seen` says, to the keys of this call and of all earlier ones."""

    def __init__(self, seen: SeenAttention) -> None:
        self.seen = seen
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        seen = self.seen
        self.keys.append(call.key[:, :: seen.repeats])
        self.values.append(call.value[:, :: seen.repeats])
        key, value = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        tokens, total = call.query.shape[2], key.shape[2]
        distance = torch.arange(total - tokens, total)[:, None] - torch.arange(total)
        mask = (distance >= 0) & (distance < (seen.window or total))
        return attention(
            call.query,
            key,
            value,
            mask,
            seen.scale,
            soft_cap=seen.soft_cap,
            sinks=seen.sinks,
        )


def heads_of_sites(model: nn.Module) -> list[tuple[str, int]]:
    """Where an engine's model attends, on this rank, and with how many heads."""
    attention = model.adapted.seen.attention
    return [(site.path, seen.heads) for site, seen in attention.items()]


@torch.no_grad()
def look(module: nn.Module, adapter: Adapter | None = None) -> Seen:
    show_attention(module)
    return see(module.eval(), adapter or Adapter(), VOCAB, 64, CPU)


@torch.no_grad()
def served(module: nn.Module, seen: Seen, steps: list[list[int]]) -> torch.Tensor:
    """Logits `[tokens, vocab]` of a sequence that is processed in `steps`."""
    attention_of = {site: CachedAttention(s) for site, s in seen.attention.items()}
    hooks, tables = PathHooks(module, seen.owners), Tables(module)
    logits, done = [], 0
    for step in steps:
        positions = torch.arange(done, done + len(step))
        done += len(step)
        hidden = run_routed(
            module, seen, attention_of, tables, torch.tensor(step), positions
        )
        if seen.head is not None:
            hidden = seen.head.logits(hidden[None])[0]
        logits.append(hidden)
    hooks.remove()
    return torch.cat(logits)


def assert_serves(module: nn.Module, adapter: Adapter | None = None) -> Seen:
    """A prompt in two chunks, and single tokens, have the logits of one forward."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    seen = look(module, adapter)
    ids = torch.randint(VOCAB, (40,), generator=generator).tolist()
    steps = [ids[:9], ids[9:37], *([token] for token in ids[37:])]
    with torch.no_grad():
        expected = full_forward(module, torch.tensor(ids), seen.form)
    torch.testing.assert_close(
        served(module, seen, steps), expected, rtol=1e-4, atol=1e-4
    )
    return seen
