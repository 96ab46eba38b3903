# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Programs that are interrupted, and what they leave on the machine."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

SHARED_MEMORY = Path("/dev/shm")
MAPPED_SEGMENT = re.compile(rf" {SHARED_MEMORY}/(.+?)(?: \(deleted\))?$", re.M)


class Program:
    """A command in a session of its own, with a temporary directory of its own.

    It is killed on the way out, with all it started.
    """

    def __init__(self, command: list[str], folder: Path, **env: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.log = folder / "log.txt"
        self._segments: set[str] = set()
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | env | {"TMPDIR": str(self.temporary)},
                start_new_session=True,
            )

    def __enter__(self) -> "Program":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Those of the session that run."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) != self.process.pid:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def wait_until(self, reached: Callable[[], bool], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.process.poll() is None, self.output()[-6000:]
            assert time.monotonic() < deadline, self.output()[-6000:]
            self._watch()

    def interrupt(self, everyone: bool) -> None:
        """As Ctrl-C does if `everyone`, else as `kill -INT` of the program."""
        if everyone:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.send_signal(signal.SIGINT)

    def ends_within(self, seconds: float) -> int:
        """Its exit code."""
        deadline = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            assert time.monotonic() < deadline, (
                f"still there after {seconds} s: {self.output()[-6000:]}"
            )
            self._watch()
        return code

    def leaves_nothing(self, seconds: float = 10) -> None:
        """No process, hence no socket, no socket file and no shared memory."""
        deadline = time.monotonic() + seconds
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"{left}\n{self.output()[-6000:]}"

    def _left(self) -> list[str]:
        left = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # it ended since it was listed
                left.append(f"{process.pid} {' '.join(process.cmdline())}")
        left += [
            str(path)
            for path in self.temporary.iterdir()
            # PyTorch's own cache of what it has compiled, which is to stay.
            if not path.name.startswith("torchinductor_")
        ]
        return left + sorted(self._segments & set(os.listdir(SHARED_MEMORY)))

    def _watch(self) -> None:
        """Wait a little, and note which shared memory the session has mapped."""
        time.sleep(0.1)
        for process in self.processes():
            with suppress(OSError):  # it is gone
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self._segments |= set(MAPPED_SEGMENT.findall(maps))
