# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adapters between a trainer and samplers: in memory, in shared memory, in files."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_config import AdapterConfig
from vllm_generic.tink.backends.base import Version
from vllm_generic.tink.backends.shared_versions import FIRST_NUMBER, SharedVersions
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.recent import RecentAdapters


def _adapter(value: float = 0.0) -> Adapter:
    config = AdapterConfig(2, target_modules=("layer",))
    return Adapter(config, {"layer": (torch.full((2, 4), value), torch.zeros(2, 3))})


def test_a_version_is_read_from_memory_if_it_was_saved_lately(tmp_path: Path) -> None:
    _adapter(1).save(tmp_path)
    version = Version("a", tmp_path)
    assert (version.read().factors["layer"][0] == 1).all()
    recent = RecentAdapters(most=1)
    recent.put(tmp_path, _adapter(2))
    version = Version("a", tmp_path, recent.get(tmp_path))
    assert (version.read().factors["layer"][0] == 2).all()
    recent.put(tmp_path / "other", _adapter())
    assert recent.get(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "use_dora": true}')
    with pytest.raises(UserError, match="use_dora=True, which is not taken"):
        Version("b", tmp_path).read()


def test_only_versions_without_requests_leave_shared_memory() -> None:
    shared = SharedVersions(most=1)

    def use(key: str):
        version = Version(key, Path("nowhere"), _adapter())
        return shared.request(version, lambda adapter: None)

    with ExitStack() as long:
        first = long.enter_context(use("a"))
        with use("b") as second, use("a") as again:
            assert again is first
            assert Path(second.lora_path).exists()
        with use("c") as third:
            assert not Path(second.lora_path).exists()
            assert third.lora_int_id == FIRST_NUMBER + 2
        assert Path(first.lora_path).exists()
    with use("b") as second, use("b") as again:
        assert second.lora_int_id == FIRST_NUMBER + 3 and again is second
    assert not Path(first.lora_path).exists()
    shared.close()
    assert not Path(second.lora_path).exists()


def test_a_version_that_is_refused_takes_no_memory() -> None:
    shared = SharedVersions(most=1)

    def refuse(adapter: Adapter) -> None:
        raise UserError("too large")

    version = Version("a", Path("nowhere"), _adapter())
    with pytest.raises(UserError, match="too large"), shared.request(version, refuse):
        pass
    with shared.request(version, lambda adapter: None) as request:
        assert request.lora_int_id == FIRST_NUMBER
    shared.close()
