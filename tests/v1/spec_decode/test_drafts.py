# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Speculation changes no output; a draft's layers may have its target's names."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm.model_executor.models.callable_model.layer_names import names_of_its_own

PROGRAM = str(Path(__file__).with_name("speculated.py"))
NATIVE, PLAIN = "vLLM's class", "a plain module"
UNCHANGED, LAYERS = "Transformers' module, unchanged", "vLLM's layers"


@functools.cache
def answers(*args: str, invariant: bool = False) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, PROGRAM, *args],
        env=os.environ
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        | ({"VLLM_BATCH_INVARIANT": "1"} if invariant else {}),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    "target, method, draft",
    [
        (PLAIN, "ngram", None),
        (PLAIN, "draft_model", PLAIN),  # both name their layers in the same way
        (LAYERS, "draft_model", LAYERS),  # so does vLLM's class
        (UNCHANGED, "draft_model", UNCHANGED),
        (NATIVE, "draft_model", PLAIN),
        (PLAIN, "draft_model", NATIVE),
    ],
)
def test_outputs_are_those_without_speculation(target, method, draft):
    alone = answers(target, "none")
    found = answers(*filter(None, (target, method, draft)))
    assert found["tokens"] == alone["tokens"]
    # A draft of its own is neither always right nor always wrong.
    assert found["accepted"] > 0
    assert found["accepted"] < found["proposed"]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("method, draft", [("ngram", None), ("draft_model", PLAIN)])
def test_batch_invariant_outputs_have_the_same_bits(method, draft):
    alone = answers(PLAIN, "none", invariant=True)
    found = answers(*filter(None, (PLAIN, method, draft)), invariant=True)
    assert found["accepted"] > 0
    assert found["tokens"] == alone["tokens"]
    assert found["logprobs"] == alone["logprobs"]


# ---- Names ---------------------------------------------------------------------------


def config(**layers: Any) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context=dict(layers), static_all_moe_layers=["experts.0"]
        )
    )


def test_layers_of_a_draft_are_renamed_where_their_name_is_taken():
    target = SimpleNamespace(layer_name="attention.0")
    vllm_config = config(**{"attention.0": target})
    table = vllm_config.compilation_config.static_forward_context
    first, second, third = (
        SimpleNamespace(layer_name=f"attention.{i}", kv_sharing_target_layer_name=None)
        for i in range(3)
    )
    with names_of_its_own(vllm_config, "draft") as layers:
        compilation = vllm_config.compilation_config
        built = compilation.static_forward_context
        assert not built  # a layer's own name is free
        built |= {"attention.0": first, "attention.1": second, "attention.2": third}
        compilation.static_all_moe_layers.append("attention.0")
        second.kv_sharing_target_layer_name = "attention.0"
    assert vllm_config.compilation_config.static_forward_context is table
    assert layers == {
        "draft.attention.0": first,
        "attention.1": second,
        "attention.2": third,
    }
    assert table == {"attention.0": target} | layers
    assert first.layer_name == "draft.attention.0"
    assert second.kv_sharing_target_layer_name == "draft.attention.0"
    assert compilation.static_all_moe_layers == ["experts.0", "draft.attention.0"]


def test_a_layer_that_cannot_be_renamed_is_refused():
    vllm_config = config(a=SimpleNamespace())
    with (
        pytest.raises(ValueError, match="^Layer a .* has the name of a layer of its"),
        names_of_its_own(vllm_config, ""),
    ):
        vllm_config.compilation_config.static_forward_context["a"] = SimpleNamespace()
    assert len(vllm_config.compilation_config.static_forward_context) == 1
