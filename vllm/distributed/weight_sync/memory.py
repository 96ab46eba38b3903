# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory that processes of one machine share, and how they wait for each other."""

from __future__ import annotations

import base64
import mmap
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

# Between two looks at a counter: at first, and at most.
PAUSE_S, LONGEST_PAUSE_S = 20e-6, 1e-3
STOPPED = "gave the update up."  # how an engine ends what a trainer has caused
CHECK_S = 0.2  # between two looks whether the other process is there


class SharedMemory:
    """Bytes that another process of the same user can map by a path.

    They have no name in any file system: when all processes that mapped them have
    ended, however they end, nothing is left.
    """

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("vllm-weight-sync")
        os.ftruncate(self._fd, size)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.tensor = _map(self._fd)

    def close(self) -> None:
        """Give the descriptor back; the memory stays while a tensor refers to it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def map_shared(path: str) -> torch.Tensor:
    """The bytes of another process's `SharedMemory`, uint8 `[size]`."""
    fd = os.open(path, os.O_RDWR)
    try:
        return _map(fd)
    finally:
        os.close(fd)


def _map(fd: int) -> torch.Tensor:
    size = os.fstat(fd).st_size
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


@dataclass(frozen=True)
class Progress:
    """What a source and its targets tell each other, in shared memory.

    Args:
        filled: int64 `[1]`. It grows by one when tensors may be read where they lie,
            and by one for each bucket; `-n` if update n was given up.
        exported: int64 `[1]`, the update in which tensors were last exported.
        summed: int64 `[1]`, the update of which the checksums of tensors that are read
            where they lie are known.
        emptied: int64 `[readers]`, as `filled`, of what each target has read.
        checksums: int64 `[blocks]`, of what was sent last.
        changed: int64 `[blocks]`, how many of its elements were sent, or `WHOLE`.

    """

    filled: torch.Tensor
    exported: torch.Tensor
    summed: torch.Tensor
    emptied: torch.Tensor
    checksums: torch.Tensor
    changed: torch.Tensor

    @staticmethod
    def size(readers: int, blocks: int) -> int:
        return 8 * (3 + readers + 2 * blocks)

    @classmethod
    def view(cls, memory: torch.Tensor, readers: int, blocks: int) -> Progress:
        numbers = memory[: cls.size(readers, blocks)].view(torch.int64)
        return cls(*numbers.split([1, 1, 1, readers, blocks, blocks]))


def wait_until(
    ready: Callable[[], bool],
    deadline: float,
    what: str,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Poll until `ready()` is true, and call `check` from time to time.

    Raises:
        TimeoutError: it was not true by `deadline`, a time of `time.monotonic()`.
        ConnectionError: `check` raises it, because the other end is gone.

    """
    pause, checked = PAUSE_S, time.monotonic()
    while not ready():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        now = time.monotonic()
        if now > checked + CHECK_S:
            checked = now
            check()
        if now > deadline:
            raise TimeoutError(f"Waited in vain for {what}.")


def require_running(processes: Mapping[int, str]) -> None:
    """Raise ConnectionError if a process of this machine has ended.

    Args:
        processes: By process id, what runs in it.

    """
    for process, name in processes.items():
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
        except FileNotFoundError:
            state = " Z"
        if state.split()[0] in ("Z", "X"):
            raise ConnectionError(f"The process of {name}, {process}, has ended.")


def export_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """What another process needs to map `tensor`, as JSON.

    On a CPU, its storage is in shared memory: of `share_memory_()`.
    """
    if tensor.device.type == "cpu":
        # The descriptor that the storage has. It stays open as long as the storage is.
        fd, _ = tensor.untyped_storage()._share_fd_cpu_()
        return {
            "path": f"/proc/{os.getpid()}/fd/{fd}",
            "size": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    _, arguments = reduce_tensor(tensor)
    (_, size, stride, offset, _, dtype, _, handle, nbytes, start, _, *counters) = (
        arguments
    )
    return {
        "size": list(size),
        "stride": list(stride),
        "offset": offset,
        "dtype": str(dtype).removeprefix("torch."),
        "handle": _encoded(handle),
        "nbytes": nbytes,
        "start": start,
        "counters": [_encoded(counter) for counter in counters],
    }


def import_tensor(exported: dict[str, Any], device: int) -> torch.Tensor:
    """The tensor that `export_tensor` of another process describes.

    Args:
        exported: The description.
        device: The number that this process has for the device of a CUDA tensor.

    """
    dtype = getattr(torch, exported["dtype"])
    if "path" in exported:
        memory = map_shared(exported["path"])
        memory = memory[: len(memory) // dtype.itemsize * dtype.itemsize]
        places = exported["size"], exported["stride"], exported["offset"]
        return memory.view(dtype).as_strided(*places)
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(exported["size"]),
        tuple(exported["stride"]),
        exported["offset"],
        torch.UntypedStorage,
        dtype,
        device,
        _decoded(exported["handle"]),
        exported["nbytes"],
        exported["start"],
        False,
        *(_decoded(counter) for counter in exported["counters"]),
    )


def _encoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return value


def _decoded(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
