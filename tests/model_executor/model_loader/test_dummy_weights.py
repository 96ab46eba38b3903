# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from torch import nn

from vllm.model_executor.model_loader.weight_utils import initialize_dummy_weights


class WithExtraState(nn.Linear):
    """Like Megatron's layers, which have an extra state and nothing in it."""

    def get_extra_state(self) -> None:
        return None


def test_a_state_dict_may_hold_what_is_no_tensor() -> None:
    layer = WithExtraState(4, 4)
    assert layer.state_dict()["_extra_state"] is None
    nn.init.constant_(layer.weight, 7.0)
    initialize_dummy_weights(layer, model_config=None)
    assert (layer.weight.abs() <= 1e-3).all()
