# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights that change under CUDA graphs, after a deep sleep, and in quantized layers.

What an engine computes after an update is compared with a fresh engine, which started
with the same weights and options.
"""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from layout_models import CONFIG, PARALLEL, PLAIN, Stage
from safetensors.torch import save_file

from vllm import ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.parallel_context import ParallelContext

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

PROMPTS = [[1, 2, 3], list(range(40)), [7]]
SHIFT = 0.5
# Decode steps replay CUDA graphs; compiling would take most of the time.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "compilation_config": GRAPHS,
    "max_num_seqs": 8,
    "max_model_len": 128,
}


class Shifted(Stage):
    """With constants that are no parameters; `constant` is not even a buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("unsaved", torch.tensor(SHIFT), persistent=False)
        self.constant = torch.tensor(SHIFT)

    def forward(self, input_ids, positions, inputs_embeds=None):
        hidden = super().forward(input_ids, positions, inputs_embeds)
        return hidden + (self.unsaved + self.constant).to(hidden.dtype)


def build_plain(vllm_config, context):
    return Shifted(vllm_config.model_config.hf_config, ParallelContext(), PLAIN)


def build_quantized(vllm_config, context):
    """Of vLLM's layers, whose linear ones quantize what they load."""
    options = {
        "return_bias": False,
        "quant_config": vllm_config.quant_config,
        "prefix": "linear",
    }
    kind = SimpleNamespace(
        embedding=PARALLEL.embedding,
        column=partial(ColumnParallelLinear, **options),
        row=partial(RowParallelLinear, **options),
        head=PARALLEL.head,
    )
    return Shifted(vllm_config.model_config.hf_config, context, kind)


def weights_of_seed(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = Stage(SimpleNamespace(**CONFIG), ParallelContext(), PLAIN).state_dict()
    return {
        name: (torch.randn(t.shape, generator=generator) * 0.2).bfloat16()
        for name, t in shapes.items()
    }


@pytest.fixture
def folders(tmp_path):
    """Two checkpoints of one model."""
    folders = []
    for seed, name in enumerate(("old", "new")):
        folder = tmp_path / name
        folder.mkdir()
        config = CONFIG | {"architectures": ["Reloaded"]}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights_of_seed(seed), folder / "model.safetensors")
        folders.append(str(folder))
    return folders


@pytest.fixture
def start_one(start):
    """Start an engine after the one before has ended."""
    engines = []

    def start_next(folder, **options):
        for llm in engines:
            llm.llm_engine.engine_core.shutdown()
        if engines:
            engines.clear()
            cleanup_dist_env_and_memory()
        engines.append(start(model=folder, **(OPTIONS | options)))
        return engines[0]

    return start_next


def answers(llm):
    """Greedy tokens and their log-probabilities, by prompt."""
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        step[token].logprob
        for output in outputs
        for token, step in zip(
            output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
        )
    ]
    assert torch.tensor(logprobs).isfinite().all()
    return tokens, logprobs


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=1e-3)


def addresses(model):
    """Where each tensor lies that a CUDA graph may read."""
    found = {name: t.data_ptr() for name, t in model.named_parameters()}
    found |= {name: t.data_ptr() for name, t in model.named_buffers()}
    return found | {"constant": model.module.constant.data_ptr()}


def constants(model):
    return float(model.unsaved), float(model.module.constant)


def parameter_dtypes(model):
    return {str(parameter.dtype) for parameter in model.parameters()}


def load_one_by_one(model, folder):
    from safetensors.torch import load_file

    for name, tensor in load_file(f"{folder}/model.safetensors").items():
        model.load_weights([(name, tensor.cuda())])


def reload(llm, folder):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})


def test_plain_module_under_cuda_graphs(start_one, folders):
    old, new = folders
    ModelRegistry.register_model("Reloaded", build_plain)
    expected_new = answers(start_one(new))
    llm = start_one(old, enable_sleep_mode=True)
    expected_old = answers(llm)
    assert expected_old[0] != expected_new[0]
    before = llm.apply_model(addresses)

    reload(llm, new)
    assert_same(answers(llm), expected_new)
    llm.apply_model(partial(load_one_by_one, folder=old))
    assert_same(answers(llm), expected_old)
    assert llm.apply_model(addresses) == before

    llm.sleep(level=2)  # drops the weights
    llm.wake_up(tags=["weights"])
    reload(llm, new)
    llm.wake_up(tags=["kv_cache"])
    assert llm.apply_model(constants) == [(SHIFT, SHIFT)]
    assert_same(answers(llm), expected_new)
    assert llm.apply_model(addresses) == before

    llm.sleep(level=1)  # keeps them on the host
    llm.wake_up()
    assert llm.apply_model(constants) == [(SHIFT, SHIFT)]
    assert_same(answers(llm), expected_new)


def test_layers_that_quantize_what_they_load(start_one, folders):
    old, new = folders
    ModelRegistry.register_model("Reloaded", build_quantized)
    fp8 = {"quantization": "fp8_per_tensor"}
    expected_new = answers(start_one(new, **fp8))
    llm = start_one(old, **fp8)
    expected_old = answers(llm)
    assert expected_old[0] != expected_new[0]
    (dtypes,) = llm.apply_model(
        lambda model: {str(p.dtype) for p in model.parameters()}
    )
    assert any("float8" in dtype for dtype in dtypes)
    before = llm.apply_model(addresses)

    reload(llm, new)
    assert_same(answers(llm), expected_new)
    reload(llm, old)
    assert_same(answers(llm), expected_old)
    assert llm.apply_model(addresses) == before
