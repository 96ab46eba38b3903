# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The adapters that were saved last, in memory: a sampler need not read their files."""

from collections import OrderedDict
from pathlib import Path

from vllm.lora.adapter import Adapter


class RecentAdapters:
    """By the folder that each was saved in; the oldest make room for new ones."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._adapters: OrderedDict[Path, Adapter] = OrderedDict()

    def put(self, folder: Path, adapter: Adapter) -> None:
        self._adapters[folder] = adapter
        self._adapters.move_to_end(folder)
        while len(self._adapters) > self._most:
            self._adapters.popitem(last=False)

    def get(self, folder: Path) -> Adapter | None:
        return self._adapters.get(folder)
