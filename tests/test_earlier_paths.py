# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules that were moved: what they offered is found at their earlier paths, too."""

import importlib

import pytest

PUBLIC = {
    "vllm.model_executor.layers.batch_invariant_training": [
        "batch_invariant",
        "token_log_probs",
    ],
    "vllm.model_executor.layers.vocab_parallel_loss": [
        "vocab_parallel_cross_entropy",
        "vocab_parallel_logits",
        "vocab_parallel_token_log_probs",
    ],
    "vllm.model_executor.model_loader.link_checkpoint": ["link_checkpoint", "main"],
    "vllm.model_executor.models.parallel_plan": [
        "HIDDEN_STATES",
        "STACKS",
        "STYLES",
        "Style",
        "apply_plans",
    ],
    "vllm.model_executor.tensor_parallel_training": [
        "TrainingState",
        "clip_grad_norm_",
        "initialize_parameters",
        "tensor_parallel_group",
    ],
    "vllm.model_validation": [
        "Check",
        "LISTED",
        "OutputDifference",
        "RESOLUTION",
        "Reference",
        "Thresholds",
        "TokenComparison",
        "ValidationReport",
        "first_difference",
        "validate",
        "validate_outputs",
    ],
}


@pytest.mark.parametrize("path", PUBLIC)
def test_a_moved_module_forwards_every_public_name(path):
    module = importlib.import_module(path)
    offered = {name for name in vars(module) if not name.startswith("_")}
    assert offered == set(PUBLIC[path])
    for name in PUBLIC[path]:
        home = getattr(vars(module)[name], "__module__", None)
        assert home != path
