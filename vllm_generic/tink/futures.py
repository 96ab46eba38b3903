# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Results that a client waits for: long polls that end when an event happens."""

import asyncio
import json
import logging
from hashlib import sha256
from typing import Any

from vllm_generic.tink.errors import NotFoundError, UserError
from vllm_generic.tink.store import DONE, EXPIRED, FAILED, JSON, PENDING, Row, Store

logger = logging.getLogger(__name__)


class Futures:
    """The operations in the store, and an event for each that is awaited.

    An operation's id is made of its queue (a model or a sampler) and its seq_id, so a
    request that is sent again finds the first one.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._events: dict[str, asyncio.Event] = {}

    def add(
        self, owner: str, queue: str, seq: int, kind: str, body: bytes
    ) -> Row | None:
        """Store a new operation, or answer None if this one is stored already."""
        key = f"{queue}/{seq}"
        digest = sha256(kind.encode() + b"\0" + body).digest()
        row = self._store.find("operations", key)
        if row is not None and row["state"] != EXPIRED:
            if row["digest"] != digest:
                raise UserError(
                    f"seq_id {seq} of {queue!r} was used before, for another request; "
                    "each request needs a number of its own"
                )
            return None
        if row is not None:
            raise UserError(f"the result of {key!r} is no longer kept")
        self._store.insert(
            "operations",
            id=key,
            owner=owner,
            queue=queue,
            seq=seq,
            kind=kind,
            body=body,
            digest=digest,
        )
        return self._store.find("operations", key)

    def finish(self, key: str, content_type: str, result: bytes) -> None:
        self._end(key, DONE, content_type, result)

    def finish_json(self, key: str, result: dict[str, Any]) -> None:
        self._end(key, DONE, JSON, json.dumps(result).encode())

    def fail(self, key: str, error: str, category: str) -> None:
        """``category``: "user" for a mistake in the request, else "server"."""
        result = json.dumps({"error": error, "category": category}).encode()
        self._end(key, FAILED, JSON, result)

    def fail_with(self, key: str, error: Exception) -> None:
        """What an operation raised: a UserError is a mistake in the request."""
        if isinstance(error, UserError):
            self.fail(key, str(error), "user")
            return
        logger.error("%s failed", key, exc_info=error)
        self.fail(key, f"{type(error).__name__}: {error}", "server")

    def _end(self, key: str, state: str, content_type: str, result: bytes) -> None:
        self._store.finish(key, state, content_type, result)
        event = self._events.pop(key, None)
        if event is not None:
            event.set()

    async def wait(self, key: str, owner: str, timeout: float) -> Row | None:
        """The finished operation, or None if it is not finished in time (seconds)."""
        row = self._store.get("operations", key, owner)
        if row["state"] == PENDING:
            event = self._events.setdefault(key, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), timeout)
            except TimeoutError:
                return None
            row = self._store.get("operations", key, owner)
        if row["state"] == EXPIRED:
            raise NotFoundError(f"the result of {key!r} is no longer kept")
        return row
