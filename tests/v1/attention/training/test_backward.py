# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The choice of a backward; what the kernels compute needs a GPU."""

import pytest

from vllm.v1.attention.training import backward
from vllm.v1.attention.training.backward import (
    BACKWARD_ENGINES,
    BACKWARD_VARIABLE,
    select_backward,
)


@pytest.fixture
def installed(monkeypatch):
    """Sets which engines are there."""

    def install(*names: str) -> None:
        engines = {name: BACKWARD_ENGINES[name] for name in names}
        monkeypatch.setattr(backward, "_available_engines", lambda: engines)

    monkeypatch.delenv(BACKWARD_VARIABLE, raising=False)
    return install


def test_the_first_that_is_there_is_used(installed):
    installed("fa4", "aten")
    assert select_backward(64, 0.0, False) is BACKWARD_ENGINES["fa4"]
    installed("aten")
    assert select_backward(64, 0.0, False) is BACKWARD_ENGINES["aten"]


def test_the_old_module_in_flash_attn_2_is_not_flash_attn_4(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not BACKWARD_ENGINES["fa4"].available()
    distribution = tmp_path / "flash_attn_4-4.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Name: flash-attn-4\nVersion: 4.0\n")
    assert BACKWARD_ENGINES["fa4"].available()


def test_the_fastest_depends_on_the_head_size(installed):
    installed("fa4", "fa3", "aten")
    assert select_backward(128, 0.0, False) is BACKWARD_ENGINES["fa4"]
    assert select_backward(192, 0.0, False) is BACKWARD_ENGINES["fa3"]
    assert select_backward(256, 0.0, True) is BACKWARD_ENGINES["fa4"]


def test_the_environment_overrides(installed, monkeypatch):
    installed("fa4", "aten")
    monkeypatch.setenv(BACKWARD_VARIABLE, "aten")
    assert select_backward(64, 0.0, False) is BACKWARD_ENGINES["aten"]
    monkeypatch.setenv(BACKWARD_VARIABLE, "fa5")
    with pytest.raises(ValueError, match="'fa5' is not available here; choose one of"):
        select_backward(64, 0.0, False)


def test_a_refusal_names_what_and_which(installed):
    installed("aten")
    with pytest.raises(
        NotImplementedError, match="aten cannot do a deterministic gradient"
    ):
        select_backward(64, 0.0, deterministic=True)
    with pytest.raises(NotImplementedError, match="aten cannot do a soft cap"):
        select_backward(64, 30.0, deterministic=False)


def test_the_next_is_used_for_what_one_cannot_do(installed):
    installed("fa3", "fa2", "aten")
    assert select_backward(256, 0.0, False) is BACKWARD_ENGINES["fa3"]
    assert select_backward(192, 0.0, True) is BACKWARD_ENGINES["fa3"]
    assert select_backward(256, 0.0, True) is BACKWARD_ENGINES["fa2"]
    assert select_backward(64, 30.0, False) is BACKWARD_ENGINES["fa2"]
    installed("fa3", "aten", "triton")
    assert select_backward(256, 0.0, True) is BACKWARD_ENGINES["triton"]
    assert select_backward(64, 30.0, False) is BACKWARD_ENGINES["triton"]
    assert select_backward(64, 0.0, False) is BACKWARD_ENGINES["fa3"]
    installed("fa3", "aten")
    message = "fa3 cannot do a deterministic gradient at head_dim 256; aten cannot do"
    with pytest.raises(NotImplementedError, match=message):
        select_backward(256, 0.0, True)
