# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the wrapper makes of a pipeline stage, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from vllm.config import CompilationMode, ParallelConfig
from vllm.distributed import parallel_state
from vllm.model_executor.layers.trainable_attention.paged import _layer_index
from vllm.model_executor.models.callable_model import _CallableRegisteredModel
from vllm.model_executor.models.interfaces import supports_pp
from vllm.model_executor.parameters.names import ModuleNames
from vllm.sequence import IntermediateTensors

HIDDEN = 4
TOKENS, POSITIONS = torch.tensor([1, 2, 3]), torch.arange(3)
RECEIVED = IntermediateTensors({"hidden_states": torch.ones(3, HIDDEN)})


@pytest.fixture
def on_stage(monkeypatch):
    """Wrap `module` as stage `rank` of two."""

    def wrap(module, rank, num_layers=4):
        group = SimpleNamespace(rank_in_group=rank)
        monkeypatch.setattr(parallel_state, "_PP", group)
        # The other stage is not there to say which weights it has.
        monkeypatch.setattr(
            ModuleNames, "shapes_on_all_ranks", lambda names, _: names.shapes()
        )
        model_config = SimpleNamespace(
            runner_type="generate",
            get_vocab_size=lambda: 8,
            get_hidden_size=lambda: HIDDEN,
            get_total_num_hidden_layers=lambda: num_layers,
            dtype=torch.float32,
            enable_prompt_embeds=False,
            hf_config=PretrainedConfig(),
            hf_text_config=PretrainedConfig(),
            uses_mrope=False,
            is_multimodal_model=False,
        )
        config = SimpleNamespace(
            additional_config={},
            quant_config=None,
            weight_transfer_config=None,
            parallel_config=ParallelConfig(pipeline_parallel_size=2),
            model_config=model_config,
            device_config=SimpleNamespace(device="cpu"),
            compilation_config=SimpleNamespace(
                mode=CompilationMode.NONE,
                static_forward_context={},
                static_all_moe_layers=[],
            ),
            lora_config=None,
            speculative_config=None,
        )
        registered = _CallableRegisteredModel(
            "Staged", lambda vllm_config, context: module, {"supports_pp": True}
        )
        model_cls = registered.load_model_cls()
        assert supports_pp(model_cls)
        return model_cls(vllm_config=config)

    return wrap


class First(nn.Module):
    """No output head: none is looked for."""

    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.embedding = nn.Embedding(8, hidden)

    def forward(self, input_ids, positions):
        return self.embedding(input_ids)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, 8)

    def forward(self, input_ids, positions, inputs_embeds=None):
        return inputs_embeds + 1


class LastAsVllm(Last):
    def forward(self, input_ids, positions, intermediate_tensors=None):
        return intermediate_tensors["hidden_states"] + intermediate_tensors["residual"]

    def make_empty_intermediate_tensors(self, batch_size, dtype, device):
        empty = torch.empty(batch_size, HIDDEN, dtype=dtype, device=device)
        return IntermediateTensors({"hidden_states": empty, "residual": empty})


class Residual(First):
    def forward(self, input_ids, positions):
        x = self.embedding(input_ids)
        return IntermediateTensors({"hidden_states": x, "residual": x})


def test_a_plain_tensor_goes_to_the_next_stage(on_stage):
    module = First()
    sent = on_stage(module, 0)(TOKENS, POSITIONS)
    assert isinstance(sent, IntermediateTensors)
    assert torch.equal(sent["hidden_states"], module(TOKENS, POSITIONS))


def test_hidden_states_come_as_inputs_embeds(on_stage):
    stage = on_stage(Last(), 1)
    hidden_states = stage(None, POSITIONS, RECEIVED)
    assert torch.equal(hidden_states, torch.full((3, HIDDEN), 2.0))
    assert stage.compute_logits(hidden_states).shape == (3, 8)


def test_vllms_own_interface_is_unchanged(on_stage):
    stage = on_stage(LastAsVllm(), 1)
    received = IntermediateTensors({**RECEIVED.tensors, "residual": torch.ones(3, 4)})
    assert torch.equal(stage(None, POSITIONS, received), torch.full((3, HIDDEN), 2.0))
    empty = stage.make_empty_intermediate_tensors(5, torch.float32, "cpu")
    assert empty.tensors.keys() == {"hidden_states", "residual"}


def test_room_for_hidden_states_is_made(on_stage):
    empty = on_stage(Last(), 1).make_empty_intermediate_tensors(
        5, torch.bfloat16, torch.device("cpu")
    )
    assert empty.tensors.keys() == {"hidden_states"}
    assert empty["hidden_states"].shape == (5, HIDDEN)
    assert empty["hidden_states"].dtype == torch.bfloat16


def test_a_later_stage_that_takes_nothing(on_stage):
    with pytest.raises(TypeError, match="no argument for the hidden states of the st"):
        on_stage(First(), 1)


@pytest.mark.parametrize("module", [First(hidden=6), Residual()])
def test_what_the_next_stage_has_no_room_for(on_stage, module):
    message = "from one pipeline stage to the next go tensors .* hidden_size 4. Give"
    with pytest.raises(ValueError, match=message):
        on_stage(module, 0)(TOKENS, POSITIONS)


def test_the_last_stage_needs_an_output_head(on_stage):
    headless = Last()
    del headless.lm_head
    with pytest.raises(TypeError, match="no way from hidden states to logits"):
        on_stage(headless, 1)


@pytest.mark.parametrize("num_layers", [0, 3, 4])
def test_made_up_attention_names_never_collide(on_stage, num_layers):
    """However many attention layers a stage builds."""
    indices = []
    for rank in range(2):
        config = on_stage(Last() if rank else First(), rank, num_layers)._vllm_config
        indices += [_layer_index(config, built) for built in range(6)]
    assert len(set(indices)) == len(indices)
    assert set(range(num_layers)) <= set(indices)
