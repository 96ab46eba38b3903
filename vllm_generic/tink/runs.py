# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training runs: the order of their requests, and how they resume."""

import json
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_generic.tink.backends.base import LoraSpec
from vllm_generic.tink.errors import BusyError, UserError
from vllm_generic.tink.futures import Futures
from vllm_generic.tink.store import DONE, Row, Store


@dataclass(frozen=True)
class Operation:
    id: str
    seq: int
    kind: str
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @staticmethod
    def of(row: Row) -> "Operation":
        return Operation(row["id"], row["seq"], row["kind"], row["body"])


@dataclass
class Progress:
    """What was summed since the last optimizer step, and the totals."""

    step: int = 0
    loss: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    total_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    id: str
    owner: str
    session_id: str
    base_model: str
    spec: LoraSpec
    snapshot_seq: int
    next_seq: int  # the first seq that is not in ``ready`` yet
    waiting: dict[int, Operation] = field(default_factory=dict)
    ready: deque[Operation] = field(default_factory=deque)
    loaded: bool = False  # whether the trainer has its adapter
    closed: bool = False  # its session is finished
    used: float = field(default_factory=time.monotonic)
    progress: Progress = field(default_factory=Progress)

    @property
    def queued(self) -> int:
        return len(self.waiting) + len(self.ready)

    def admit(self, operation: Operation) -> None:
        """Requests may arrive in any order; they become ready in the order of seq."""
        self.waiting[operation.seq] = operation
        while self.next_seq in self.waiting:
            self.ready.append(self.waiting.pop(self.next_seq))
            self.next_seq += 1


class Runs:
    """The runs of all users, looked up by id and owner."""

    def __init__(self, store: Store, futures: Futures, max_queued: int) -> None:
        self._store = store
        self._futures = futures
        self._max_queued = max_queued
        self._runs: dict[str, Run] = {}

    def __iter__(self):
        return iter(self._runs.values())

    def get(self, run_id: str, owner: str) -> Run:
        """The run; NotFoundError if there is none, or if it is another user's."""
        row = self._store.get("runs", run_id, owner)
        return self._runs.get(run_id) or self._open(row)

    def _open(self, row: Row) -> Run:
        """A run that an earlier process served, with the requests that it has left."""
        pending = [Operation.of(row) for row in self._store.operations(row["id"])]
        run = Run(
            id=row["id"],
            owner=row["owner"],
            session_id=row["session_id"],
            base_model=row["base_model"],
            spec=LoraSpec(**json.loads(row["spec"])),
            snapshot_seq=row["snapshot_seq"],
            next_seq=self._store.last_seq(row["id"]) + 1,
        )
        run.progress.step = len(self._store.history(run.id))
        for operation in pending:
            run.admit(operation)
        self._runs[run.id] = run
        return run

    def reopen_pending(self) -> None:
        """Take up every run that has acknowledged requests left."""
        for queue in self._store.pending_queues():
            row = self._store.find("runs", queue)
            if row is not None and queue not in self._runs:
                self._open(row)

    def create(
        self,
        *,
        owner: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        metadata: dict[str, Any] | None,
        kind: str,
        body: bytes,
    ) -> tuple[str, Run]:
        """The request id and the run; a request sent again finds the first one's."""
        self._store.open_session(session_id, owner)
        run_id = f"{session_id}:train:{model_seq_id}"
        now = time.time()
        with self._store.transaction():
            added = self._futures.add(owner, run_id, 0, kind, body)
            if added is not None:
                self._store.insert(
                    "runs",
                    id=run_id,
                    session_id=session_id,
                    owner=owner,
                    base_model=base_model,
                    spec=json.dumps(asdict(spec)),
                    metadata=json.dumps(metadata),
                    created=now,
                    last_request=now,
                )
        return f"{run_id}/0", self.get(run_id, owner)

    def submit(self, owner: str, run_id: str, seq: int, kind: str, body: bytes) -> str:
        """Acknowledge one request of a run; answers the request's id."""
        run = self.get(run_id, owner)
        self._store.open_session(run.session_id, owner)
        if not 1 <= seq < 2**31:
            raise UserError(f"seq_id is {seq}; a model's requests are counted from 1")
        # The request that the others wait for is always taken: a batch's first chunk
        # comes last.
        full = run.queued >= self._max_queued and seq != run.next_seq
        if full and self._store.find("operations", f"{run_id}/{seq}") is None:
            raise BusyError(f"model {run_id!r} has {run.queued} requests queued")
        added = self._futures.add(owner, run_id, seq, kind, body)
        if added is not None:
            self._store.update("runs", run_id, last_request=time.time())
            run.admit(Operation.of(added))
        run.used = time.monotonic()
        return f"{run_id}/{seq}"

    def journal(self, run: Run, before: int) -> list[Operation]:
        """The requests since the last snapshot, which have to be executed again."""
        rows = self._store.operations(run.id, run.snapshot_seq, (DONE,))
        return [Operation.of(row) for row in rows if row["seq"] < before]

    def close_session(self, session_id: str) -> None:
        for run in self._runs.values():
            if run.session_id == session_id:
                run.closed = True
