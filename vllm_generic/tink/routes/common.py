# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What routes share: the service and the user of a request."""

from typing import Annotated

from fastapi import Depends, Request

from vllm_generic.tink.auth import user_of
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.service import Service


def _service(request: Request) -> Service:
    return request.app.state.service


def user_of_request(request: Request) -> str:
    """Raises InvalidKeyError if its key is not known."""
    key = request.headers.get("x-api-key")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if key is None and scheme.lower() == "bearer":
        key = token
    return user_of(key, _service(request).settings.api_keys)


async def _body(request: Request) -> bytes:
    """The body, if it is not larger than the service takes."""
    limit = _service(request).settings.max_body_bytes
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UserError("compressed bodies are not taken")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise UserError(f"the body is larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


ServiceOf = Annotated[Service, Depends(_service)]
User = Annotated[str, Depends(user_of_request)]
RawBody = Annotated[bytes, Depends(_body)]
