# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The batch-invariant mode: an engine on two ranks, a trainer on one device.

Other layouts and layers are compared as modules, by
tests/distributed/test_layout_invariance.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from layout_models import CONFIG, PlannedStage, build_parallel, build_plain
from safetensors.torch import save_file

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.platforms import current_platform
from vllm.training.batch_invariance import batch_invariant, token_log_probs
from vllm.validation.first_difference import first_difference

PROMPTS = [list(range(1, 60)), [5], [*range(1, 40), 99], [3, 1, 4, 1, 5] * 11]
NEW_TOKENS = 20


def checkpoint(folder, dtype):
    """The trainer's module, whose weights are saved in `folder`."""
    config = CONFIG | {"architectures": ["LayoutModel"], "dtype": str(dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    model = build_plain(SimpleNamespace(**CONFIG)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def served_log_probs(output) -> list[float]:
    """Of every token but the first, those of the prompt included."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [entry[i].logprob for i, entry in zip(ids[1:], entries, strict=True)]


@pytest.mark.engine
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=str,
)
def test_an_engine_on_two_ranks_and_a_trainer_on_one(
    dtype, tmp_path, monkeypatch, start
) -> None:
    """Sampled and greedy, with chunks of prefill and batches."""
    device = current_platform.device_type
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    model = sum_as_divided(checkpoint(tmp_path, dtype), PlannedStage.tp_plan)
    model.to(device)
    ModelRegistry.register_model("LayoutModel", build_parallel)
    llm = start(
        model=str(tmp_path),
        dtype=str(dtype)[6:],
        tensor_parallel_size=2,
        skip_tokenizer_init=True,
        max_num_batched_tokens=32,
        max_num_seqs=3,
        max_model_len=128,
        enforce_eager=True,
    )
    outputs = []
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature,
            max_tokens=NEW_TOKENS,
            logprobs=0,
            prompt_logprobs=0,
            detokenize=False,
            ignore_eos=True,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs += llm.generate(prompts, params, use_tqdm=False)
    with batch_invariant(), torch.no_grad():
        for output in outputs:
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            tokens = torch.tensor(ids, device=device)
            hidden = model(tokens, torch.arange(len(ids), device=device))
            logits = model.lm_head(hidden)
            expected = token_log_probs(logits[:-1], tokens[1:])
            assert expected.tolist() == served_log_probs(output)
        assert first_difference(llm, model, PROMPTS[0][:30]) is None
        # A bias that is not the engine's: the module is named, not those after it.
        model.layers["2"].mlp.down.bias[3] += 0.25
        difference = first_difference(llm, model, PROMPTS[0][:30])
    assert difference is not None and difference.name == "layers.2.mlp.down"
    assert 0 < difference.differing <= 1 / CONFIG["hidden_size"]
