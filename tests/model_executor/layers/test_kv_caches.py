# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines whose model calls an attention layer several times, or also trains."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_model import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    TinyModel,
    full_sequence_logits,
    greedy,
    trained_model,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.attention import Attention

# 70 tokens take five chunks; the second begins with the same block of 32.
PROMPTS = [
    [(7 * i * i + 3) % 128 for i in range(70)],
    [(7 * i * i + 3) % 128 for i in range(40)],
]
CHUNKS = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 32}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))


class Looped(TinyModel):
    """Calls its layers in turn, `loops` times; in the middle also in another order.

    One of the layers has a second name, and its attention is part of another layer.
    """

    loops = 2

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.layers[0]
        self.layers[1].attention = self.layers[0].attention

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embedding(input_ids) + self.positions(positions)
        for layer in (*self.layers, self.alias, *reversed(self.layers)) * self.loops:
            hidden_states = layer(hidden_states) / 2
        return hidden_states


def looped_reference() -> Looped:
    model = Looped()
    model.load_state_dict(trained_model().state_dict(), strict=False)
    return model


def wrapper_of(llm: LLM) -> nn.Module:
    return llm.apply_model(lambda model: model)[0]


def assert_serves_as(llm: LLM, reference: TinyModel) -> None:
    """Greedy tokens and their log-probabilities, with chunks and a cached prefix."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False)
    for prompt, cached in zip(PROMPTS, (0, 32), strict=True):
        (out,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        assert out.num_cached_tokens == cached
        served = list(out.outputs[0].token_ids)
        assert served == greedy(reference, prompt, 8)
        logits = full_sequence_logits(reference, prompt + served)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(served)[:, None])[:, 0]
        found = [
            step[token].logprob
            for step, token in zip(out.outputs[0].logprobs, served, strict=True)
        ]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def serve(start: Callable, model_dir: object) -> Iterator[Callable]:
    def serve(factory: Callable, **options: object) -> LLM:
        ModelRegistry.register_model("TinyModel", factory)
        return start(**(CHUNKS | options))

    yield serve


def with_loops(model: Looped, state: dict[str, torch.Tensor]) -> Looped:
    """The checkpoint holds each tensor once; the names of the module share them."""
    model.load_weights = lambda weights: set(model.load_state_dict(state) and state)
    return model


@pytest.mark.engine
def test_each_call_has_its_cache_and_training_goes_on_beside(serve: Callable) -> None:
    reference = looped_reference()
    state = reference.state_dict()
    llm = serve(lambda c, p: with_loops(Looped(), state))
    model = wrapper_of(llm).module
    assert list(model.state_dict()) == list(state)
    attention = model.layers[0].attention
    assert 1 + len(attention.paged_later) == 10
    assert_serves_as(llm, reference)

    # A thread that trains the module that serves, with checkpoints in between.
    batch = torch.arange(24).view(2, 12) % 128
    positions = torch.arange(12).expand(2, 12)

    def gradients(model: Looped) -> list[torch.Tensor]:
        hidden = checkpoint(model, batch, positions, use_reentrant=False)
        logits = model.lm_head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients(reference)
    stop, rounds, errors = threading.Event(), [], []

    def train() -> None:
        try:
            while not stop.is_set() or len(rounds) < 2:
                for x, y in zip(gradients(model), expected, strict=True):
                    torch.testing.assert_close(x, y)
                rounds.append(1)
        except BaseException as error:  # noqa: BLE001 - raised by the test
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(2):
            llm.reset_prefix_cache()
            assert_serves_as(llm, reference)
    finally:
        stop.set()
        thread.join()
    assert not errors, errors[0]

    # another number of loops than the engine has caches for
    for loops, words in ((3, "at least 11 times"), (1, "5 times")):
        model.loops = loops
        with (
            torch.inference_mode(),
            set_forward_context(None, wrapper_of(llm)._vllm_config, num_tokens=4),
            pytest.raises(RuntimeError, match=rf"layers.0.att.*{words}.*10 times"),
        ):
            wrapper_of(llm)(torch.arange(4), torch.arange(4))


@pytest.mark.engine
def test_each_call_has_its_cache_where_the_model_is_compiled(
    serve: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    reference = looped_reference()
    state = reference.state_dict()
    llm = serve(lambda c, p: with_loops(Looped(), state), enforce_eager=False)
    wrapper = wrapper_of(llm)
    assert wrapper.compiled and not wrapper.do_not_compile
    assert_serves_as(llm, reference)
    # compiled code leaves nothing behind: a call now is a trainer's
    hidden = wrapper.module(torch.arange(12).view(2, 6), torch.arange(6))
    assert hidden.shape == (2, 6, HIDDEN) and hidden.requires_grad


class OwnAttention(TinyModel):
    """Calls an attention layer of vLLM's own twice."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Attention(HEADS, HEAD_DIM, 1.0, prefix="layers.9.attn")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = super().forward(input_ids, positions)
        for _ in range(2):
            hidden_states = self.own(hidden_states, hidden_states, hidden_states)
        return hidden_states


@pytest.mark.engine
def test_vllms_own_attention_may_be_called_once(serve: Callable) -> None:
    with pytest.raises(ValueError, match="'own' is called 2 times in one forward"):
        serve(lambda c, p: OwnAttention(), load_format="dummy")


@pytest.mark.engine
def test_a_layer_of_another_engine_is_refused(serve: Callable) -> None:
    built: list[nn.Module] = []

    def factory(vllm_config: object, parallel_context: object) -> nn.Module:
        if not built:
            built.append(TinyModel())
        return built[0]

    serve(factory)
    assert isinstance(built[0].layers[0].attention, TrainableAttention)
    with pytest.raises(RuntimeError, match="was built for another engine"):
        serve(factory)
