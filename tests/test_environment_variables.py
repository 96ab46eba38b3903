# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import os

import vllm.envs as envs
from vllm.platforms import current_platform


def test_vllm_knows_our_variables(monkeypatch):
    for name in list(os.environ):  # set by other programs
        if name.startswith("VLLM_") and name not in envs.environment_variables:
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_MODEL_FACTORY_TIMEOUT_S", "7")
    monkeypatch.setenv("VLLM_MODEL_SELF_CHECK", "0")
    monkeypatch.setenv("VLLM_TRAINING_ATTENTION_BACKWARD", "aten")
    current_platform.validate_environ(hard_fail=True)
    assert envs.VLLM_MODEL_FACTORY_TIMEOUT_S == 7
    assert not envs.VLLM_MODEL_SELF_CHECK
    hidden = {
        "VLLM_MODEL_FACTORY_TIMEOUT_S",
        "VLLM_MODEL_SELF_CHECK",
        "VLLM_TRAINING_ATTENTION_BACKWARD",
    }
    assert not hidden & envs.compile_factors().keys()
