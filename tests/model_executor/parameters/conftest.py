# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine, and what says which weights it serves."""

import json
from functools import partial

import pytest
from safetensors.torch import save_file
from update_models import KINDS

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_validation import validate
from vllm.v1.engine.mixed_weights import MixedWeightsError

PROMPTS = [[1, 2, 3], list(range(30)), [7]]
MAX_TOKENS = 8
MIXTURE = r"mixture of old and new ones.*{}.*Not loaded since: .*Load all weights"


class Served:
    """An engine of one kind, which starts with the weights `old`."""

    def __init__(self, llm: LLM, kind, folder) -> None:
        self.llm = llm
        self.kind = kind
        self.folder = folder
        self.old, self.new = kind.weights(0), kind.weights(1)

    def apply(self, function, **arguments):
        return self.llm.apply_model(partial(function, **arguments))

    def reload(self, **arguments):
        self.llm.collective_rpc("reload_weights", kwargs=arguments)

    def assert_serves(self, weights):
        """The same greedy tokens, and their log-probabilities but for rounding."""
        self.llm.reset_prefix_cache()  # it has keys and values of earlier weights
        report = validate(self.llm, self.kind.logits(weights), PROMPTS, MAX_TOKENS)
        assert report.passed, report.to_json()

    def assert_refuses(self, reason):
        params = SamplingParams(max_tokens=1, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        for _ in range(2):
            with pytest.raises(MixedWeightsError, match=MIXTURE.format(reason)):
                self.llm.generate(prompts, params, use_tqdm=False)


@pytest.fixture
def serve(start, tmp_path):
    def serve_kind(name, **options):
        if name == "megatron":
            pytest.importorskip("megatron.core")
        kind = KINDS[name]
        for folder, seed in (("old", 0), ("new", 1)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "config.json").write_text(json.dumps(kind.config))
            save_file(kind.weights(seed), tmp_path / folder / "model.safetensors")
        ModelRegistry.register_model("Updated", kind.factory, supports_pp=True)
        llm = start(
            model=str(tmp_path / "old"),
            max_model_len=64,
            max_logprobs=-1,
            **options,
        )
        return Served(llm, kind, tmp_path)

    return serve_kind
