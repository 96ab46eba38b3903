# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The real client against a service: training, weights, sampling."""

from typing import Any

import numpy as np
import pytest
import torch
from tink_client import MODEL, TEXT, datum, logprobs, train, training
from tinker import types


def test_train_then_sample(service: Any) -> None:
    client = training(service)
    losses = train(client, 6)
    assert losses[-1] < losses[0] / 2
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TEXT[:5])
    params = types.SamplingParams(max_tokens=8, seed=3, temperature=1.0)
    sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    first, second = sampled.sequences
    assert first.tokens != second.tokens
    assert len(first.tokens) == len(first.logprobs) == 8
    # the trainer gives the same log-probabilities, bit for bit
    trained = logprobs(client, TEXT[:5] + first.tokens)
    assert (trained[-8:] == np.float32(first.logprobs)).all()
    again = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    assert [s.tokens for s in again.sequences] == [first.tokens, second.tokens]


def test_a_step_waits_for_nothing_and_gradients_add_up(service: Any) -> None:
    """Two passes and a step equal one pass over both and a step."""
    apart, together = training(service), training(service)
    other = datum(list(range(100, 110)))
    apart.forward_backward([datum(TEXT)], "cross_entropy")
    apart.forward([datum(TEXT)], "cross_entropy")  # leaves gradients alone
    apart.forward_backward([other], "cross_entropy")
    apart.optim_step(types.AdamParams(learning_rate=1e-2))
    together.forward_backward([datum(TEXT), other], "cross_entropy")
    together.optim_step(types.AdamParams(learning_rate=1e-2))
    assert (logprobs(apart) == logprobs(together)).all()


def test_clipping(service: Any) -> None:
    """The norm of the gradient is told as it was, and clipped for the step."""
    client = training(service)
    client.forward_backward([datum(TEXT)], "cross_entropy")
    params = types.AdamParams(learning_rate=1e-2, grad_clip_norm=1e-3)
    assert client.optim_step(params).result().metrics["grad_norm:mean"] > 1


def test_state_is_saved_and_loaded_with_and_without_optimizer(service: Any) -> None:
    client = training(service)
    train(client, 3)
    path = client.save_state("ck1").result().path
    assert path.endswith("/weights/ck1")
    train(client, 1)
    expected = logprobs(client)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().lora_rank == 8
    train(resumed, 1)
    assert (logprobs(resumed) == expected).all()
    fresh = service.create_training_client_from_state(path).result()
    train(fresh, 1)
    assert (logprobs(fresh) != expected).any()
    # into a model that exists
    with pytest.warns(FutureWarning):
        client.load_state_with_optimizer(path).result()
    train(client, 1)
    assert (logprobs(client) == expected).all()


def test_a_name_is_taken_once(service: Any) -> None:
    client = training(service)
    client.save_state("same").result()
    with pytest.raises(Exception, match="exists; choose another name"):
        client.save_state("same").result()
    with pytest.raises(Exception, match="the name '../../etc' is not taken"):
        client.save_state("../../etc").result()


def test_custom_loss(service: Any) -> None:
    """A loss that the client computes gives the gradient of that loss."""

    def squares(
        data: list[types.Datum], outputs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = torch.stack([(lp**2).sum() for lp in outputs]).sum()
        return loss, {"squares": float(loss)}

    client, same = training(service), training(service)
    before = logprobs(client)
    data = [datum(TEXT)]
    out = client.forward_backward_custom(data, squares).result()
    assert out.metrics["squares"] == pytest.approx(float((before**2).sum()), rel=1e-5)
    # d(sum lp^2)/d(lp) = 2 lp, so cross entropy with the weights -2 lp is the same
    weights = (-2 * before).tolist()
    same.forward_backward([datum(TEXT, weights=weights)], "cross_entropy").result()
    for each in (client, same):
        each.optim_step(types.AdamParams(learning_rate=1e-2))
    assert logprobs(client) == pytest.approx(logprobs(same), abs=1e-5)


def test_samplers_named_ephemeral_and_base(service: Any) -> None:
    client = training(service)
    prompt = types.ModelInput.from_ints(TEXT)
    untrained = client.save_weights_and_get_sampling_client().result()
    base = service.create_sampling_client(base_model=MODEL).result()
    train(client, 2)
    path = client.save_weights_for_sampler("smp1").result().path
    train(client, 2)
    named = service.create_sampling_client(model_path=path).result()
    newest = client.save_weights_and_get_sampling_client().result()
    # a new adapter changes nothing; each sampler keeps the weights it was made of
    scores = [
        np.float32(each.compute_logprobs(prompt).result()[1:])
        for each in (base, untrained, named, newest)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[1].sum() < scores[2].sum() < scores[3].sum()
    assert (scores[3] == logprobs(client)).all()
    assert named.compute_logprobs(prompt).result()[0] is None
    last = newest.compute_logprobs(prompt, prompt_logprobs_last_n=3).result()
    assert [value is None for value in last] == [True] * 17 + [False] * 3


def test_where_sampling_stops(service: Any) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints(TEXT)

    def sample(**params: Any) -> types.SampledSequence:
        params = {"max_tokens": 12, "temperature": 0.0} | params
        sampling = types.SamplingParams(**params)
        return sampler.sample(prompt, 1, sampling).result().sequences[0]

    free = sample(stop=[])
    assert len(free.tokens) == 12 and free.stop_reason == "length"
    index = next(i for i, token in enumerate(free.tokens) if i > 2)
    token = free.tokens[index]
    stopped = sample(stop=[token])
    first = free.tokens.index(token)
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.stop_reason == "stop"
    text = training(service).get_tokenizer().decode([token])
    by_text = sample(stop=text)
    assert by_text.stop_reason == "stop"
    assert by_text.tokens == free.tokens[: len(by_text.tokens)]


def test_top_k_target_and_alternative_logprobs(service: Any) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints(TEXT)
    targets = torch.full((len(TEXT) - 1, 2), -1, dtype=torch.int64)
    targets[4, 0] = TEXT[5]
    out = sampler.sample(
        prompt,
        1,
        types.SamplingParams(max_tokens=4, temperature=0.0),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=types.TensorData.from_torch_sparse(
            targets, pad_value=-1
        ),
        prompt_alt_tokens_k=2,
    ).result()
    assert out.topk_prompt_logprobs[0] is None
    assert [len(top) for top in out.topk_prompt_logprobs[1:]] == [3] * 19
    (sequence,) = out.sequences
    # greedy sampling draws the likeliest token
    for token, logprob, top in zip(
        sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True
    ):
        assert top[0] == (token, pytest.approx(logprob))
    assert out.target_prompt_logprobs.to_torch()[4, 0] == np.float32(
        out.prompt_logprobs[5]
    )
    assert out.prompt_alt_tokens.tokens.to_torch().shape == (19, 2)
    assert (out.prompt_alt_tokens.logprobs.to_torch() < 0).all()


def test_rest_client(service: Any) -> None:
    rest = service.create_rest_client()
    capabilities = rest.get_server_capabilities().result()
    assert capabilities.supported_models[0].model_name == MODEL
    client = training(service, user_metadata={"who": "me"})
    path = client.save_state("a", ttl_seconds=3600).result().path
    client.save_weights_for_sampler("b").result()
    runs = rest.list_training_runs(limit=100).result()
    (run,) = [r for r in runs.training_runs if r.training_run_id == client.model_id]
    assert run.lora_rank == 8 and run.last_checkpoint.tinker_path == path
    assert run.user_metadata == {"who": "me"}
    assert run == rest.get_training_run(client.model_id).result()
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_unembed) == (MODEL, 8, True)
    saved = rest.list_checkpoints(client.model_id).result().checkpoints
    assert {c.checkpoint_id for c in saved} == {"weights/a", "sampler_weights/b"}
    assert saved[0].expires_at is not None and saved[0].size_bytes > 1000
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    (first, _) = rest.list_checkpoints(client.model_id).result().checkpoints
    assert first.public and first.expires_at is None
    rest.delete_checkpoint_from_tinker_path(path).result()
    left = rest.list_user_checkpoints().result().checkpoints
    assert path not in [checkpoint.tinker_path for checkpoint in left]
    with pytest.raises(Exception, match="does not exist"):
        service.create_training_client_from_state(path).result()
    session = rest.get_session(client.model_id.split(":")[0]).result()
    assert client.model_id in session.training_run_ids


def test_a_finished_session_takes_no_requests(server: Any) -> None:
    other = server.client()
    client = training(other)
    other.close("success").result()
    with pytest.raises(Exception, match=r"finished|closed"):
        client.forward([datum(TEXT)], "cross_entropy").result()
