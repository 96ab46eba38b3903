# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models without a KV cache, and prompts longer than a step."""

from collections.abc import Callable

import pytest
import torch
from tiny_model import HIDDEN, POSITIONS, VOCAB, TinyModel, greedy, trained_model
from torch import nn

from vllm import ModelRegistry, SamplingParams
from vllm.config import PoolerConfig
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.pooler import DispatchPooler

SHORT_STEPS = {"max_num_batched_tokens": 16, "max_num_seqs": 4}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))


class Bigrams(TinyModel):
    """Each token follows from the one before it and from its position."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # without TinyModel's attention
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN)
        self.layers = nn.ModuleList()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def load_weights(self, weights: object) -> None:
        self.load_state_dict(trained_model().state_dict(), strict=False)


@pytest.mark.engine
def test_a_long_prompt_comes_in_chunks(start: Callable) -> None:
    ModelRegistry.register_model(
        "TinyModel", lambda c, p: Bigrams(), is_attention_free=True
    )
    llm = start(**SHORT_STEPS)
    reference = Bigrams()
    reference.load_weights(None)
    prompts = [[(7 * i * i + 3) % VOCAB for i in range(n)] for n in (70, 16, 3)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=8, detokenize=False),
        use_tqdm=False,
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == greedy(reference, prompt, 8)


class Embedder(nn.Module):
    """Attends in both directions, which needs a whole prompt in one step."""

    def __init__(self, vllm_config: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.attention = TrainableAttention(2, HIDDEN // 2, causal=False)
        pooler_config = vllm_config.model_config.pooler_config
        self.pooler = DispatchPooler.for_embedding(pooler_config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embedding(input_ids)
        return self.attention(hidden_states, hidden_states, hidden_states)


@pytest.mark.engine
def test_a_pooling_model_whose_prompts_do_not_fit_is_refused(
    start: Callable, model_dir_with_tokenizer: object
) -> None:
    ModelRegistry.register_model(
        "TinyModel",
        lambda c, p: Embedder(c),
        is_pooling_model=True,
        attn_type="encoder_only",
    )
    with pytest.raises(ValueError, match=r"\(16\) is smaller than max_model_len"):
        start(
            runner="pooling",
            skip_tokenizer_init=False,
            load_format="dummy",
            pooler_config=PoolerConfig(seq_pooling_type="LAST"),
            **SHORT_STEPS,
        )
