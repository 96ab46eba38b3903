# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the client's RestClient asks: capabilities, runs and checkpoints."""

import json
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from vllm_generic.tink import requests
from vllm_generic.tink.checkpoints import KINDS, tinker_path
from vllm_generic.tink.routes.common import ServiceOf, User
from vllm_generic.tink.service import Service
from vllm_generic.tink.store import Row

router = APIRouter()


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _checkpoint(row: Row) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row['kind']}/{row['name']}",
        "checkpoint_type": KINDS[row["kind"]],
        "time": _time(row["created"]),
        "tinker_path": row["path"],
        "size_bytes": row["size"],
        "public": bool(row["public"]),
        "user_metadata": json.loads(row["metadata"] or "null"),
        "expires_at": _time(row["expires"]),
    }


def _run(service: Service, row: Row) -> dict[str, Any]:
    saved = service.store.checkpoints_of_run(row["id"])

    def last(kind: str) -> dict[str, Any] | None:
        rows = [checkpoint for checkpoint in saved if checkpoint["kind"] == kind]
        return _checkpoint(rows[-1]) if rows else None

    return {
        "training_run_id": row["id"],
        "base_model": row["base_model"],
        "model_owner": row["owner"],
        "is_lora": True,
        "corrupted": False,
        "lora_rank": json.loads(row["spec"])["rank"],
        "last_request_time": _time(row["last_request"]),
        "last_checkpoint": last("weights"),
        "last_sampler_checkpoint": last("sampler_weights"),
        "user_metadata": json.loads(row["metadata"] or "null"),
    }


@router.get("/get_server_capabilities")
async def get_server_capabilities(service: ServiceOf, user: User) -> dict[str, Any]:
    return {
        "supported_models": [
            {
                "model_name": service.model_name,
                "max_context_length": service.trainer.max_length,
                "trainable": True,
                "sampleable": True,
            }
        ]
    }


@router.get("/training_runs")
async def list_training_runs(
    service: ServiceOf, user: User, limit: int = 20, offset: int = 0
) -> dict[str, Any]:
    rows = service.store.list_of("runs", user, limit, offset)
    total = service.store.count_of("runs", user)
    return {
        "training_runs": [_run(service, row) for row in rows],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@router.get("/training_runs/{run_id}")
async def get_training_run(
    run_id: str, service: ServiceOf, user: User
) -> dict[str, Any]:
    return _run(service, service.store.get("runs", run_id, user))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_checkpoints(
    run_id: str, service: ServiceOf, user: User
) -> dict[str, Any]:
    service.store.get("runs", run_id, user)
    rows = service.store.checkpoints_of_run(run_id)
    return {"checkpoints": [_checkpoint(row) for row in rows]}


@router.get("/checkpoints")
async def list_user_checkpoints(
    service: ServiceOf, user: User, limit: int = 100, offset: int = 0
) -> dict[str, Any]:
    rows = service.store.checkpoints_of_owner(user)
    return {
        "checkpoints": [_checkpoint(row) for row in rows[offset : offset + limit]],
        "cursor": {"offset": offset, "limit": limit, "total_count": len(rows)},
    }


def _own_path(service: Service, run_id: str, kind: str, name: str, user: str) -> str:
    service.store.get("runs", run_id, user)
    path = tinker_path(run_id, kind, name)
    return service.store.checkpoint(path, user)["path"]


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
async def delete_checkpoint(
    run_id: str, kind: str, name: str, service: ServiceOf, user: User
) -> None:
    service.delete_checkpoint(_own_path(service, run_id, kind, name, user))


@router.post(
    "/training_runs/{run_id}/checkpoints/{kind}/{name}/publish", status_code=204
)
async def publish(
    run_id: str, kind: str, name: str, service: ServiceOf, user: User
) -> None:
    """Every user of this service may read the checkpoint."""
    path = _own_path(service, run_id, kind, name, user)
    service.store.update_checkpoint(path, public=1)


@router.delete(
    "/training_runs/{run_id}/checkpoints/{kind}/{name}/publish", status_code=204
)
async def unpublish(
    run_id: str, kind: str, name: str, service: ServiceOf, user: User
) -> None:
    path = _own_path(service, run_id, kind, name, user)
    service.store.update_checkpoint(path, public=0)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl", status_code=204)
async def set_ttl(
    run_id: str,
    kind: str,
    name: str,
    body: requests.Ttl,
    service: ServiceOf,
    user: User,
) -> None:
    """Delete the checkpoint after that time, or never if there is none."""
    path = _own_path(service, run_id, kind, name, user)
    expires = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    service.store.update_checkpoint(path, expires=expires)
