# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One engine reads prompts, another one decodes from the KV cache that it stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_model import TinyModel

from vllm import LLM, ModelRegistry, SamplingParams

BLOCK = 32
PROMPTS = [
    [(7 * i * i + 3) % 120 for i in range(70)],
    [(5 * i) % 120 for i in range(41)],
]


def answers(llm: LLM, max_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs]


@pytest.mark.engine
@pytest.mark.slow
def test_a_decoding_engine_reads_what_another_one_stored(
    start: Callable[..., LLM], model_dir: Path, tmp_path: Path
) -> None:
    ModelRegistry.register_model("TinyModel", lambda config, context: TinyModel())
    stored = tmp_path / "kv"

    def engine(role: str) -> LLM:
        return start(
            processes=True,
            block_size=BLOCK,
            enable_prefix_caching=False,
            disable_log_stats=False,
            kv_transfer_config={
                "kv_connector": "ExampleConnector",
                "kv_role": role,
                "kv_connector_extra_config": {"shared_storage_path": str(stored)},
            },
        )

    wanted = answers(start(processes=True, block_size=BLOCK), 16)
    answers(engine("kv_producer"), 1)
    files = list(stored.rglob("*.safetensors"))
    assert len(files) == 2 * len(PROMPTS)  # one for each layer
    assert all(load_file(file)["kv_cache"].abs().sum() > 0 for file in files)
    decode = engine("kv_consumer")
    assert answers(decode, 16) == wanted
    metrics = {m.name: getattr(m, "value", None) for m in decode.get_metrics()}
    whole_blocks = sum(len(prompt) // BLOCK * BLOCK for prompt in PROMPTS)
    assert metrics["vllm:external_prefix_cache_hits"] == whole_blocks
