# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A page of curves, drawn by the browser from what ``history`` answers."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from vllm_generic.tink.routes.common import ServiceOf, User

router = APIRouter()


@router.get("/", response_class=HTMLResponse)
async def page() -> str:
    """Without a key: the page asks for one, and sends it with its own requests."""
    return files("vllm_generic.tink").joinpath("page.html").read_text("utf-8")


@router.post("/api/v1/history/{run_id}")
async def report(
    run_id: str, metrics: dict[str, float], service: ServiceOf, user: User
) -> dict[str, Any]:
    """Add metrics of the last step that only the training loop knows, as a reward."""
    run = service.runs.get(run_id, user)
    service.store.add_history(run.id, run.progress.step, metrics)
    return {"step": run.progress.step}
