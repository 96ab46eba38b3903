# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Requests as the client sends them, one at a time and in any order."""

from typing import Any

import httpx
import numpy as np
from tink_server import TinkServer
from tinker.proto import tinker_public_pb2 as pb

KEY = {"X-API-Key": "tml-local"}


def post(server: TinkServer, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/api/v1/{path}", json=body, headers=KEY, timeout=60)


def new_model(server: TinkServer) -> str:
    session = post(server, "create_session", {}).json()["session_id"]
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "tiny/model",
        "lora_config": {"rank": 4, "seed": 7},
    }
    return post(server, "create_model", body).json()["model_id"]


def submit_batch(
    server: TinkServer, model: str, seq: int, token: int
) -> httpx.Response:
    message = pb.ForwardBackwardRequest(
        model_id=model, seq_id=seq, loss_fn="cross_entropy"
    )
    item = message.data.add()
    tokens = np.arange(token, token + 8)
    item.model_input.add().encoded_text.tokens = tokens[:-1].astype("<i4").tobytes()
    targets = item.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = tokens[1:].astype("<i8").tobytes(), pb.DTYPE_INT64
    weights = item.loss_fn_inputs["weights"]
    weights.dense, weights.dtype = np.ones(7, "<f4").tobytes(), pb.DTYPE_FLOAT32
    return httpx.post(
        f"{server.url}/api/v1/forward_backward",
        content=message.SerializeToString(),
        headers=KEY | {"Content-Type": "application/x-protobuf"},
    )


def step(server: TinkServer, model: str, seq: int) -> httpx.Response:
    body = {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 0.01}}
    return post(server, "optim_step", body)


def result(server: TinkServer, request_id: str) -> httpx.Response:
    while True:
        answer = post(server, "retrieve_future", {"request_id": request_id})
        if answer.status_code != 408:
            return answer
