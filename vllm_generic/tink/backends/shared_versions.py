# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The versions of adapters that an engine of this machine samples from."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from vllm.lora.adapter import Adapter
from vllm.lora.request import LoRARequest
from vllm.lora.shared_adapters import SharedAdapters
from vllm_generic.tink.backends.base import Version

FIRST_NUMBER = 1_000_000


@dataclass
class _Shared:
    request: LoRARequest
    users: int = 0


class SharedVersions:
    """Puts versions into shared memory, and takes out what was not used lately.

    An engine may read an adapter again while a request for it runs, so only versions
    without requests make room.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._memory = SharedAdapters()
        # vLLM's API in the same process numbers its own adapters from 1 on
        self._numbers = count(FIRST_NUMBER)
        self._versions: OrderedDict[str, _Shared] = OrderedDict()

    def close(self) -> None:
        self._memory.close()

    @contextmanager
    def request(
        self, version: Version, check: Callable[[Adapter], None]
    ) -> Iterator[LoRARequest]:
        """How the engine finds a version; `check` may refuse a new one."""
        shared = self._versions.get(version.key)
        if shared is None:
            adapter = version.read()
            check(adapter)
            number = next(self._numbers)
            shared = _Shared(self._memory.put(adapter, version.key, number))
            self._versions[version.key] = shared
        self._versions.move_to_end(version.key)
        shared.users += 1
        try:
            self._make_room()
            yield shared.request
        finally:
            shared.users -= 1

    def _make_room(self) -> None:
        unused = [key for key, shared in self._versions.items() if not shared.users]
        surplus = len(self._versions) - self._most
        for key in unused[: max(surplus, 0)]:
            self._memory.drop(self._versions.pop(key).request)
