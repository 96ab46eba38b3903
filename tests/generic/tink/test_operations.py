# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Services that are killed, users that are kept apart, and what an operator sees."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tink_client import MODEL, TEXT, datum, logprobs, train, training
from tink_requests import KEY, new_model, post, result, step, submit_batch
from tink_server import TinkServer
from tinker import types


@pytest.fixture
def private(tmp_path: Path) -> TinkServer:
    """A service of the test's own, not started."""
    return TinkServer(tmp_path / "state")


def test_a_killed_service_loses_nothing_that_it_acknowledged(
    private: TinkServer, service: Any
) -> None:
    """A client goes on after kill -9 as if nothing had happened.

    The state is that of an unbroken run: through 9 steps, of which 8 are in a snapshot,
    a gradient that was not applied yet, and requests that were only acknowledged.
    """
    unbroken = training(service)
    train(unbroken, 9)
    unbroken.forward_backward([datum(TEXT[:9])], "cross_entropy").result()
    expected = train(unbroken, 2)
    try:
        private.start()
        client = training(private.client())
        train(client, 9)
        client.forward_backward([datum(TEXT[:9])], "cross_entropy").result()
        saved = client.save_state("before").result().path
        sampler = client.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(TEXT)
        scores = sampler.compute_logprobs(prompt).result()
        waiting = new_model(private)
        submit_batch(private, waiting, 1, 10)
        step(private, waiting, 3)  # acknowledged, and waits for 2
        private.kill()
        private.start()
        assert train(client, 2) == expected
        assert (logprobs(client) == logprobs(unbroken)).all()
        assert sampler.compute_logprobs(prompt).result() == scores
        submit_batch(private, waiting, 2, 20)
        assert "metrics" in result(private, f"{waiting}/3").json()
        again = private.client()
        resumed = again.create_training_client_from_state_with_optimizer(saved).result()
        assert resumed.get_info().lora_rank == 8
    finally:
        private.stop()


def test_users_never_see_each_other(tmp_path: Path) -> None:
    keys = ["--api-key", "ann=tml-ann", "--api-key", "bob=tml-bob"]
    with TinkServer(tmp_path / "state", *keys, "--max-queued-training", "2") as server:
        ann, bob = server.client("tml-ann"), server.client("tml-bob")
        client = training(ann)
        path = client.save_state("mine").result().path
        ann_rest, bob_rest = ann.create_rest_client(), bob.create_rest_client()
        assert len(ann_rest.list_training_runs().result().training_runs) == 1
        assert not bob_rest.list_training_runs().result().training_runs
        assert not bob_rest.list_user_checkpoints().result().checkpoints
        refused = [
            lambda: bob_rest.get_training_run(client.model_id).result(),
            lambda: bob_rest.get_weights_info_by_tinker_path(path).result(),
            lambda: bob_rest.delete_checkpoint_from_tinker_path(path).result(),
            lambda: bob.create_training_client_from_state(path).result(),
            lambda: bob.create_sampling_client(model_path=path).result(),
        ]
        for call in refused:
            with pytest.raises(Exception, match="does not exist"):
                call()
        bobs = {"X-API-Key": "tml-bob"}
        for route, body in (
            ("retrieve_future", {"request_id": f"{client.model_id}/0"}),
            ("get_info", {"model_id": client.model_id}),
            ("optim_step", {"model_id": client.model_id, "seq_id": 9}),
        ):
            url = f"{server.url}/api/v1/{route}"
            assert httpx.post(url, json=body, headers=bobs).status_code == 404
        history = httpx.get(
            f"{server.url}/api/v1/history/{client.model_id}", headers=bobs
        )
        assert history.status_code == 404
        # Ann may show it
        ann_rest.publish_checkpoint_from_tinker_path(path).result()
        assert bob_rest.get_weights_info_by_tinker_path(path).result().lora_rank == 8
        # a key that is not configured
        assert post(server, "create_session", {}).status_code == 401
        _queues_are_bounded(server, client.model_id)


def _queues_are_bounded(server: TinkServer, model: str) -> None:
    """The request that all wait for is taken though the queue is full."""
    key = {"X-API-Key": "tml-ann"}
    url = f"{server.url}/api/v1/optim_step"

    def send(seq: int) -> httpx.Response:
        return httpx.post(url, json={"model_id": model, "seq_id": seq}, headers=key)

    assert [send(seq).status_code for seq in (5, 4, 3)] == [200, 200, 429]
    assert send(4).status_code == 200  # sent again, known
    assert send(2).status_code == 200
    answer = httpx.get(f"{server.url}/metrics").text
    assert "tink_rejected_requests_total 1.0" in answer


def test_health_metrics_and_status(service: Any, server: TinkServer) -> None:
    client = training(service)
    train(client, 2)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "tink_trained_tokens_total" in metrics
    assert 'tink_operation_seconds_count{kind="optim_step"}' in metrics
    command = [sys.executable, "-m", "vllm_generic.tink", "status"]
    table = subprocess.run(
        [*command, "--url", server.url], capture_output=True, text=True, check=True
    ).stdout
    assert table.startswith(f"{MODEL}: ")
    (line,) = [row for row in table.splitlines() if client.model_id in row]
    assert line.split()[1:3] == ["8", "2"] and line.split()[-1] == "loaded"
    nobody = subprocess.run(
        [*command, "--url", "http://127.0.0.1:9"], capture_output=True, text=True
    )
    assert nobody.returncode == 1 and "no service answers" in nobody.stderr
    history = httpx.get(f"{server.url}/api/v1/history/{client.model_id}", headers=KEY)
    assert [row["step"] for row in history.json()["steps"]] == [1, 2]
    # what only the loop knows is drawn beside the loss
    url = f"{server.url}/api/v1/history/{client.model_id}"
    assert httpx.post(url, json={"reward": 0.5}, headers=KEY).json() == {"step": 2}
    last = json.loads(httpx.get(url, headers=KEY).json()["steps"][-1]["metrics"])
    assert last["reward"] == 0.5 and last["loss"] > 0
    assert "<title>tink</title>" in httpx.get(server.url).text
