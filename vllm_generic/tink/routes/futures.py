# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Results, by long polls."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from vllm_generic.tink import requests
from vllm_generic.tink.routes.common import ServiceOf, User

router = APIRouter()


@router.post("/retrieve_future")
async def retrieve_future(
    body: requests.RetrieveFuture, service: ServiceOf, user: User
) -> Response:
    """Answers when the result is there, or with 408: the client then asks again."""
    timeout = service.settings.long_poll_seconds
    row = await service.futures.wait(body.request_id, user, timeout)
    if row is None:
        pending = {"request_id": body.request_id, "queue_state": "active"}
        return JSONResponse(pending, status_code=408)
    return Response(row["result"], media_type=row["content_type"])


@router.post("/cancel_future")
async def cancel_future(
    body: requests.RetrieveFuture, service: ServiceOf, user: User
) -> dict[str, Any]:
    service.store.get("operations", body.request_id, user)
    service.sampling.cancel(body.request_id)
    return {}
