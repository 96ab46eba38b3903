# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A framework's own model: converted, trained in pipeline stages, and served."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from cached_steps import SHAPE, TOKENS, VOCAB, assert_serves
from framework_model import LAYERS, FrameworkModel, from_hugging_face, to_hugging_face
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from vllm import ModelRegistry
from vllm.model_executor.models.adapter import full_forward
from vllm.model_validation import validate

CONFIG = SHAPE | {"layer_kind": "PreLNLayer", "rms_norm_eps": 1e-6}
BATCH, LENGTH, STEPS = 4, 16, 3


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, **TOKENS, rms_norm_eps=1e-6)
    return transformers.LlamaForCausalLM(config)


def framework_model(**changes):
    return FrameworkModel(SimpleNamespace(**CONFIG | changes))


@pytest.mark.parametrize("kind", LAYERS)
def test_its_blocks_serve_as_they_stand(kind):
    torch.manual_seed(0)
    seen = assert_serves(framework_model(layer_kind=kind))
    assert len(seen.attention) == 2 and seen.head is not None


def test_a_name_map_converts_a_checkpoint_and_back():
    source = llama()
    state = source.state_dict()
    model = framework_model()
    model.load_state_dict(from_hugging_face(state))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids), source(ids).logits)
    back = to_hugging_face(model.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def batches():
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, BATCH, LENGTH + 1)
    return torch.randint(VOCAB, shape, generator=generator)


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train_alone(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model(batch[:, :-1]), batch[:, 1:]).backward()
        optimizer.step()


class Stage(torch.nn.Module):
    """A rank's part of the model, with the names of the whole."""

    def __init__(self, model, rank):
        super().__init__()
        self.causal_lm = model.causal_lm
        stack = self.causal_lm.layer_stack
        if rank == 0:
            del stack.layers["1"], self.causal_lm.output_decoder, stack.layer_norm
        else:
            del stack.layers["0"], self.causal_lm.input_encoder
        self.is_first = rank == 0

    def forward(self, x):
        inner = self.causal_lm
        if self.is_first:
            return inner.layer_stack.layers["0"](inner.input_encoder(x))
        x = inner.layer_stack.layers["1"](x)
        return inner.output_decoder(inner.layer_stack.layer_norm(x))


def train_stages(context):
    """Fine-tune a converted checkpoint under 1F1B, and save each stage's tensors."""
    folder = os.environ["STAGES"]
    group = context.get_pp_process_group()
    rank = group.rank()
    model = framework_model()
    model.load_state_dict(from_hugging_face(llama().state_dict()))
    stage = Stage(model, rank)
    pipeline = PipelineStage(stage, rank, 2, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(pipeline, n_microbatches=2, loss_fn=loss_of)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(batch[:, :-1].contiguous())
        else:
            schedule.step(target=batch[:, 1:].contiguous())
        optimizer.step()
    save_file(stage.state_dict(), f"{folder}/stage-{rank}.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with the weights of both stages, as two files."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGES", str(folder))
        run_ranks(train_stages, folder, pipeline_parallel_size=2)
    config = CONFIG | {"architectures": ["Framework"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole(folder):
    model = framework_model()
    files = (folder / f"stage-{rank}.safetensors" for rank in range(2))
    model.load_state_dict({k: v for file in files for k, v in load_file(file).items()})
    return model


def test_stages_under_1f1b_train_what_one_process_does(trained):
    alone = framework_model()
    alone.load_state_dict(from_hugging_face(llama().state_dict()))
    train_alone(alone)
    for name, tensor in whole(trained).state_dict().items():
        torch.testing.assert_close(tensor, alone.get_parameter(name), msg=name)


TP = dict(tensor_parallel_size=2)
PP = dict(pipeline_parallel_size=2)


@pytest.mark.engine
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TP, marks=pytest.mark.slow),
        PP,
        pytest.param(TP | PP, marks=pytest.mark.slow),
    ],
)
def test_the_trained_stages_serve(trained, start, layout):
    def build(vllm_config, context):
        return FrameworkModel(vllm_config.model_config.hf_config)

    ModelRegistry.register_model("Framework", build, supports_pp=True)
    llm = start(model=str(trained), max_logprobs=-1, **layout)
    module = whole(trained)
    prompts = [[1, 2, 3], [9] * 11]
    report = validate(llm, lambda ids: full_forward(module, ids), prompts, max_tokens=8)
    assert report.exit_code == 0, str(report)
    values = {check.name: check.value for check in report.checks}
    assert values["greedy agreement"] == 1
    assert values["max |Δ log p|"] < 1e-4
