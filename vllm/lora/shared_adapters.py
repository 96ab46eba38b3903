# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters that go from a trainer to engines of the same machine without a disk.

    shared = SharedAdapters()
    request = shared.put(trainer.adapters["a"], "a-step-3", lora_int_id=3)
    llm.add_lora(request)  # or leave it to the first prompt
    llm.generate(prompts, lora_request=request)

They are PEFT's files in the system's shared memory, so `LoRARequest` and
`/v1/load_lora_adapter` take their paths as any others. Each `put` has a path of its
own, so that no prefix that was cached for an earlier version is found for it.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from pathlib import Path

from vllm.lora.request import LoRARequest

from .adapter import Adapter

SHARED_MEMORY = Path("/dev/shm")


class SharedAdapters:
    """A folder of adapters in shared memory, which ends with this object.

    An engine reads an adapter when it first needs it, and again if it had no room to
    keep it, so the adapter has to stay until its last request has ended.
    """

    def __init__(self) -> None:
        where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="vllm-lora-", dir=where))
        self._numbers = itertools.count(1)
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, True)

    def put(self, adapter: Adapter, name: str, lora_int_id: int) -> LoRARequest:
        """Write an adapter; returns the request by which an engine finds it.

        Args:
            adapter: its values as they are now.
            name: for the engine, which tells adapters apart by it.
            lora_int_id: a number from 1 on, by which workers tell adapters apart.

        """
        path = self.folder / str(next(self._numbers))
        adapter.save(path)
        return LoRARequest(name, lora_int_id, str(path))

    def drop(self, request: LoRARequest) -> None:
        """Free the memory of what `put` wrote."""
        shutil.rmtree(request.lora_path)
