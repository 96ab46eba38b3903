# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""For whoever operates the service: health, metrics, and the state of a user's runs."""

import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from vllm_generic.tink.routes.common import ServiceOf, User

router = APIRouter()


@router.get("/health")
@router.get("/api/v1/healthz")
async def health(service: ServiceOf) -> JSONResponse:
    """200 only while requests are being served."""
    failure = service.failure()
    if failure is not None:
        return JSONResponse({"status": "failed", "reason": failure}, status_code=503)
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(service: ServiceOf) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/api/v1/status")
async def status(service: ServiceOf, user: User) -> dict[str, Any]:
    """The user's runs and their queues, for ``tink status``."""
    runs = []
    for row in service.store.list_of("runs", user, limit=200):
        run = service.runs.get(row["id"], user)
        history = service.store.history(run.id)
        progress = run.progress
        runs.append(
            {
                "model_id": run.id,
                "rank": run.spec.rank,
                "step": progress.step,
                "metrics": history[-1]["metrics"] if history else None,
                "queued": run.queued,
                "loaded": run.loaded,
                "closed": run.closed,
                "tokens_per_second": (
                    progress.total_tokens / progress.seconds if progress.seconds else 0
                ),
                "idle_seconds": time.time() - row["last_request"],
            }
        )
    return {
        "base_model": service.model_name,
        "uptime_seconds": time.time() - service.started,
        "sampling_queued": service.sampling.queued,
        "runs": runs,
    }


@router.get("/api/v1/history/{run_id}")
async def history(run_id: str, service: ServiceOf, user: User) -> dict[str, Any]:
    """The metrics of each optimizer step."""
    service.store.get("runs", run_id, user)
    rows = service.store.history(run_id)
    return {"steps": [{"step": r["step"], "metrics": r["metrics"]} for r in rows]}
