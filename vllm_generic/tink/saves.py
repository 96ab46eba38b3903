# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a run's weights are saved, and the rows that tell of them."""

import json
import time
from dataclasses import asdict, replace
from typing import Any

from vllm_generic.tink import training as ops
from vllm_generic.tink.checkpoints import Checkpoints, check_name, tinker_path
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.futures import Futures
from vllm_generic.tink.store import Store

_FOLDER_OF = {
    ops.SAVE: "weights",
    ops.SAVE_SAMPLER: "sampler_weights",
    ops.SAVE_EXTERNAL: "external_weights",
}


class Saves:
    def __init__(
        self, store: Store, futures: Futures, checkpoints: Checkpoints
    ) -> None:
        self._store = store
        self._futures = futures
        self._checkpoints = checkpoints

    def prepare(self, step: ops.Step) -> tuple[ops.Step, dict[str, Any]]:
        """The step with its target folder, and its request with a name."""
        run, operation = step.run, step.operation
        request = operation.json()
        if _is_ephemeral(request):
            sampler = f"{run.session_id}:sample:{request['sampling_session_seq_id']}"
            return replace(step, target=self._checkpoints.sampler(sampler)), request
        name = check_name(request.get("path") or f"{operation.seq:06d}")
        kind = _FOLDER_OF[operation.kind]
        row = self._store.find_checkpoint(tinker_path(run.id, kind, name))
        # after a crash the same request may find what it has written itself
        taken = row is not None and row["request_id"] != operation.id
        if taken and not request.get("overwrite"):
            raise UserError(
                f"checkpoint {tinker_path(run.id, kind, name)!r} exists; choose "
                "another name, or save with overwrite=True"
            )
        target = self._checkpoints.named(run.id, kind, name)
        return replace(step, target=target), {**request, "path": name}

    def record(self, step: ops.Step, request: dict[str, Any], size: int) -> None:
        """Tell of saved weights and finish the request, both or neither."""
        run, operation = step.run, step.operation
        now = time.time()
        if _is_ephemeral(request):
            sampler = f"{run.session_id}:sample:{request['sampling_session_seq_id']}"
            with self._store.transaction():
                if self._store.find("samplers", sampler) is None:
                    self._store.insert(
                        "samplers",
                        id=sampler,
                        session_id=run.session_id,
                        owner=run.owner,
                        folder=str(step.target),
                        created=now,
                    )
                ephemeral = {
                    "sampling_session_id": sampler,
                    "path": None,
                    "type": operation.kind,
                }
                self._futures.finish_json(operation.id, ephemeral)
            return
        kind, name = _FOLDER_OF[operation.kind], request["path"]
        path = tinker_path(run.id, kind, name)
        ttl = request.get("ttl_seconds")
        with self._store.transaction():
            self._store.put_checkpoint(
                path=path,
                run_id=run.id,
                owner=run.owner,
                kind=kind,
                name=name,
                request_id=operation.id,
                spec=json.dumps(asdict(run.spec)),
                size=size,
                created=now,
                expires=None if ttl is None else now + ttl,
                metadata=json.dumps(request.get("user_metadata")),
            )
            result: dict[str, Any] = {"path": path, "type": operation.kind}
            if operation.kind == ops.SAVE_EXTERNAL:
                result["size_bytes"] = size
            self._futures.finish_json(operation.id, result)


def _is_ephemeral(request: dict[str, Any]) -> bool:
    return request.get("sampling_session_seq_id") is not None
