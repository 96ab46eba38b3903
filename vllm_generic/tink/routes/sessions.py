# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The client's start, its sessions and their heartbeats."""

import json
import time
import uuid
from typing import Any

from fastapi import APIRouter, Response

from vllm_generic.tink import requests
from vllm_generic.tink.routes.common import ServiceOf, User

router = APIRouter()


@router.post("/client/config")
async def client_config(user: User) -> dict[str, Any]:
    return {}


@router.post("/client/dynamic_config")
async def dynamic_config(user: User) -> dict[str, Any]:
    return {"sample_cancel_enabled": True}


@router.post("/telemetry")
async def telemetry(user: User) -> dict[str, Any]:
    """Accept the client's telemetry and drop it."""
    return {"status": "accepted"}


@router.post("/create_session")
async def create_session(
    body: requests.CreateSession, service: ServiceOf, user: User
) -> dict[str, Any]:
    session_id, now = uuid.uuid4().hex, time.time()
    service.store.insert(
        "sessions",
        id=session_id,
        owner=user,
        created=now,
        last_seen=now,
        display_name=body.display_name,
        metadata=json.dumps(body.user_metadata),
    )
    return {"type": "create_session", "session_id": session_id}


@router.post("/session_heartbeat", response_model=None)
async def session_heartbeat(
    body: requests.SessionBody, service: ServiceOf, user: User
) -> dict[str, Any] | Response:
    row = service.store.get("sessions", body.session_id, user)
    if row["finished"] is not None:
        return Response(status_code=410)
    service.store.update("sessions", body.session_id, last_seen=time.time())
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish_session(
    session_id: str, body: requests.FinishSession, service: ServiceOf, user: User
) -> dict[str, Any]:
    """End a session; of several calls, the first one's reason is kept."""
    row = service.store.get("sessions", session_id, user)
    if row["finished"] is None:
        service.store.update("sessions", session_id, finished=body.model_dump_json())
        service.runs.close_session(session_id)
    return {}


@router.get("/sessions")
async def list_sessions(
    service: ServiceOf, user: User, limit: int = 20, offset: int = 0
) -> dict[str, Any]:
    rows = service.store.list_of("sessions", user, limit, offset)
    return {"sessions": [row["id"] for row in rows]}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str, service: ServiceOf, user: User
) -> dict[str, Any]:
    store = service.store
    row = store.get("sessions", session_id, user)
    return {
        "training_run_ids": [run["id"] for run in store.of_session("runs", session_id)],
        "sampler_ids": [s["id"] for s in store.of_session("samplers", session_id)],
        "user_metadata": json.loads(row["metadata"]),
        "display_name": row["display_name"],
    }
