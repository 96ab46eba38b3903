# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Requests that come out of order, twice, or too many; runs side by side."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tink_client import MODEL, TEXT, datum, logprobs, train, training
from tink_requests import new_model, post, result, step, submit_batch
from tink_server import TinkServer
from tinker.proto import tinker_public_pb2 as pb


def test_a_large_batch_in_chunks(service: Any) -> None:
    """2,100 datums are sent as three requests, the first one last."""
    data = [datum([i % 900, (i * 7) % 900, (i * 3) % 900]) for i in range(2100)]
    client = training(service)
    out = client.forward_backward(data, "cross_entropy").result()
    assert len(out.loss_fn_outputs) == 2100
    some = range(0, 2100, 100)
    again = client.forward([data[i] for i in some], "cross_entropy").result()
    for index, alone in zip(some, again.loss_fn_outputs, strict=True):
        assert out.loss_fn_outputs[index]["logprobs"].data == alone["logprobs"].data


def test_requests_are_executed_in_the_order_of_their_numbers(
    server: TinkServer,
) -> None:
    ordered, shuffled = new_model(server), new_model(server)
    for model, order in ((ordered, (1, 2, 3, 4)), (shuffled, (4, 3, 2, 1))):
        for seq in order:
            if seq == 3:
                step(server, model, seq)
            else:
                submit_batch(server, model, seq, token=10 * seq)
    for seq in (1, 2, 4):
        one = result(server, f"{ordered}/{seq}").content
        other = result(server, f"{shuffled}/{seq}").content
        assert pb.ForwardBackwardOutput.FromString(one) == (
            pb.ForwardBackwardOutput.FromString(other)
        )
    norms = [result(server, f"{model}/3").json() for model in (ordered, shuffled)]
    assert norms[0] == norms[1]


def test_a_request_sent_again_has_no_second_effect(server: TinkServer) -> None:
    once, twice = new_model(server), new_model(server)
    for model, times in ((once, 1), (twice, 3)):
        for seq in (1, 2):
            for _ in range(times):
                sent = (
                    submit_batch(server, model, seq, 10)
                    if seq == 1
                    else step(server, model, seq)
                )
                assert sent.json()["request_id"] == f"{model}/{seq}"
        for _ in range(times):
            assert step(server, model, 2).status_code == 200
        submit_batch(server, model, 3, 10)
    results = [
        pb.ForwardBackwardOutput.FromString(result(server, f"{m}/3").content)
        for m in (once, twice)
    ]
    assert results[0] == results[1]
    other = submit_batch(server, twice, 3, token=50)
    assert other.status_code == 400
    assert "used before" in other.json()["detail"]


def test_an_answer_comes_when_there_is_one(server: TinkServer) -> None:
    """A poll is held until the result is there, and any number may wait for it."""
    model = new_model(server)
    submit_batch(server, model, 2, 20)
    with ThreadPoolExecutor(4) as pool:
        polls = [pool.submit(result, server, f"{model}/2") for _ in range(4)]
        assert not any(poll.done() for poll in polls)
        submit_batch(server, model, 1, 10)
        assert len({poll.result().content for poll in polls}) == 1


def test_a_bad_request_fails_alone(service: Any) -> None:
    client, other = training(service), training(service)
    bad = client.forward_backward([datum([1, 5000, 2])], "cross_entropy")
    with pytest.raises(Exception, match="input has the token 5000"):
        bad.result()
    train(other, 1)
    assert train(client, 1) == train(training(service), 1)


def test_four_clients_at_once_have_the_bits_of_each_alone(server: TinkServer) -> None:
    ranks = (4, 8, 16, 32)
    texts = {rank: list(range(rank, rank + 24)) for rank in ranks}
    found: dict[int, np.ndarray] = {}

    def one(rank: int, barrier: threading.Barrier) -> None:
        client = training(server.client(), rank=rank)
        barrier.wait(60)
        train(client, 3, [datum(texts[rank])])
        found[rank] = logprobs(client, texts[rank])

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=one, args=(r, barrier)) for r in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together, found = found, {}
    for rank in ranks:
        one(rank, threading.Barrier(1))
        assert (together[rank] == found[rank]).all()


def test_what_is_not_served_is_told(service: Any, server: TinkServer) -> None:
    with pytest.raises(Exception, match="this service has 'tiny/model'"):
        service.create_lora_training_client(base_model="Qwen/Qwen3-8B").result()
    client = training(service)
    with pytest.raises(Exception, match="its definition is not public"):
        client.forward([datum(TEXT)], "stable_reinforce").result()
    unknown = post(server, "retrieve_future", {"request_id": "nothing/1"})
    assert unknown.status_code == 404
    wrong = post(server, "create_model", {"session_id": "x"})
    assert wrong.status_code == 422 and "model_seq_id" in wrong.json()["detail"]


def test_a_cancelled_sample_ends(service: Any, server: TinkServer) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()
    name = sampler._sampling_session_id
    body = {
        "sampling_session_id": name,
        "seq_id": 7,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": TEXT}]},
        "sampling_params": {"max_tokens": 2000, "stop": []},
    }
    key = post(server, "asample", body).json()["request_id"]
    post(server, "cancel_future", {"request_id": key})
    assert "cancelled" in result(server, key).json()["error"]
