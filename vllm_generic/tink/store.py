# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What must survive the end of the process: an SQLite database in WAL mode.

A row is committed before the request that made it is answered. The event loop's thread
is the only one that uses the database.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_generic.tink.errors import NotFoundError, UserError
from vllm_generic.tink.schema import TABLES

PENDING, DONE, FAILED, EXPIRED = "pending", "done", "failed", "expired"
JSON, PROTOBUF = "application/json", "application/x-protobuf"

Row = sqlite3.Row


class Store:
    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        # survives a killed process; only a power cut may lose the last commits
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(TABLES)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes in the block, or none."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> Row | None:
        return self._db.execute(query, values).fetchone()

    def _all(self, query: str, *values: Any) -> list[Row]:
        return self._db.execute(query, values).fetchall()

    def insert(self, table: str, **values: Any) -> None:
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        self._db.execute(
            f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values())
        )

    def update(self, table: str, key: str, **values: Any) -> None:
        """Set columns of the row whose id is ``key``."""
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(
            f"UPDATE {table} SET {names} WHERE id = ?", (*values.values(), key)
        )

    def get(self, table: str, key: str, owner: str | None = None) -> Row:
        """The row with this id; NotFoundError if it is missing or another user's."""
        row = self._one(f"SELECT * FROM {table} WHERE id = ?", key)
        if row is None or (owner is not None and row["owner"] != owner):
            raise NotFoundError(f"{table.removesuffix('s')} {key!r} does not exist")
        return row

    def find(self, table: str, key: str) -> Row | None:
        return self._one(f"SELECT * FROM {table} WHERE id = ?", key)

    # sessions, runs and samplers

    def open_session(self, session_id: str, owner: str) -> Row:
        """A session that can still be used."""
        row = self.get("sessions", session_id, owner)
        if row["finished"] is not None:
            raise UserError(
                f"session {session_id!r} is finished; create another ServiceClient"
            )
        return row

    def list_of(
        self, table: str, owner: str, limit: int = -1, offset: int = 0
    ) -> list[Row]:
        return self._all(
            f"SELECT * FROM {table} WHERE owner = ? ORDER BY created DESC, id "
            "LIMIT ? OFFSET ?",
            owner,
            limit,
            offset,
        )

    def count_of(self, table: str, owner: str) -> int:
        row = self._one(f"SELECT COUNT(*) FROM {table} WHERE owner = ?", owner)
        return 0 if row is None else int(row[0])

    def of_session(self, table: str, session_id: str) -> list[Row]:
        return self._all(
            f"SELECT * FROM {table} WHERE session_id = ? ORDER BY created", session_id
        )

    def stale_samplers(self, before: float) -> list[Row]:
        """Ephemeral samplers of sessions that are over or have been silent."""
        return self._all(
            "SELECT s.* FROM samplers s JOIN sessions c ON c.id = s.session_id "
            "WHERE s.folder != '' AND (c.finished IS NOT NULL OR c.last_seen < ?)",
            before,
        )

    # operations

    def operations(
        self, queue: str, after: int = -1, states: Iterable[str] = (PENDING,)
    ) -> list[Row]:
        """The operations of a queue by rising seq, without results."""
        wanted = json.dumps(list(states))
        return self._all(
            "SELECT id, owner, queue, seq, kind, body, state FROM operations "
            "WHERE queue = ? AND seq > ? "
            "AND state IN (SELECT value FROM json_each(?)) ORDER BY seq",
            queue,
            after,
            wanted,
        )

    def pending_queues(self) -> list[str]:
        rows = self._all(
            "SELECT DISTINCT queue FROM operations WHERE state = ? ORDER BY queue",
            PENDING,
        )
        return [row["queue"] for row in rows]

    def last_seq(self, queue: str) -> int:
        """The highest seq that has been executed, -1 if none was."""
        row = self._one(
            "SELECT MAX(seq) FROM operations WHERE queue = ? AND state != ?",
            queue,
            PENDING,
        )
        return -1 if row is None or row[0] is None else int(row[0])

    def finish(
        self, operation: str, state: str, content_type: str, result: bytes
    ) -> None:
        self.update(
            "operations",
            operation,
            state=state,
            content_type=content_type,
            result=result,
            finished=time.time(),
        )

    def snapshot_taken(self, run_id: str, seq: int) -> None:
        """What was executed up to ``seq`` need not be executed again.

        To be called in a transaction.
        """
        self.update("runs", run_id, snapshot_seq=seq)
        self._db.execute(
            "UPDATE operations SET body = NULL WHERE queue = ? AND seq <= ?",
            (run_id, seq),
        )

    def expire_results(self, before: float) -> None:
        """Drop the results that were finished before that time."""
        self._db.execute(
            "UPDATE operations SET state = ?, result = NULL WHERE state IN (?, ?) "
            "AND finished < ? AND (body IS NULL OR kind = 'sample')",
            (EXPIRED, DONE, FAILED, before),
        )

    # checkpoints

    def checkpoint(self, path: str, owner: str | None = None) -> Row:
        """A checkpoint that ``owner`` may read: their own, or a public one."""
        row = self._one("SELECT * FROM checkpoints WHERE path = ?", path)
        readable = row is not None and (owner is None or row["owner"] == owner)
        if row is None or not (readable or row["public"]):
            raise NotFoundError(f"checkpoint {path!r} does not exist")
        return row

    def find_checkpoint(self, path: str) -> Row | None:
        return self._one("SELECT * FROM checkpoints WHERE path = ?", path)

    def checkpoints_of_run(self, run_id: str) -> list[Row]:
        return self._all(
            "SELECT * FROM checkpoints WHERE run_id = ? ORDER BY created", run_id
        )

    def checkpoints_of_owner(self, owner: str) -> list[Row]:
        return self._all(
            "SELECT * FROM checkpoints WHERE owner = ? ORDER BY created DESC", owner
        )

    def expired_checkpoints(self, now: float) -> list[Row]:
        return self._all("SELECT * FROM checkpoints WHERE expires < ?", now)

    def put_checkpoint(self, **values: Any) -> None:
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        self._db.execute(
            f"INSERT OR REPLACE INTO checkpoints ({names}) VALUES ({marks})",
            tuple(values.values()),
        )

    def update_checkpoint(self, path: str, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(
            f"UPDATE checkpoints SET {names} WHERE path = ?", (*values.values(), path)
        )

    def delete_checkpoint(self, path: str) -> None:
        self._db.execute("DELETE FROM checkpoints WHERE path = ?", (path,))

    # adapters that were trained elsewhere

    def put_adapter(self, owner: str, name: str, folder: str) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?)",
            (owner, name, folder, time.time()),
        )

    def adapters(self, owner: str) -> list[Row]:
        return self._all("SELECT * FROM adapters WHERE owner = ? ORDER BY name", owner)

    def delete_adapter(self, owner: str, name: str) -> bool:
        """Whether there was one."""
        query = "DELETE FROM adapters WHERE owner = ? AND name = ?"
        return self._db.execute(query, (owner, name)).rowcount > 0

    # curves

    def add_history(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step; those of a second call are merged into them."""
        self._db.execute(
            "INSERT INTO history (run_id, step, time, metrics) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (run_id, step) "
            "DO UPDATE SET metrics = json_patch(history.metrics, excluded.metrics)",
            (run_id, step, time.time(), json.dumps(metrics)),
        )

    def history(self, run_id: str) -> list[Row]:
        return self._all("SELECT * FROM history WHERE run_id = ? ORDER BY step", run_id)
