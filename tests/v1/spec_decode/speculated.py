# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One engine with a draft, for test_drafts.py: prints what it answered as JSON.

vLLM's CPU platform cannot start a second engine in a process that has speculated.

    python speculated.py TARGET METHOD [DRAFT]

TARGET and DRAFT are titles of columns of tests/features, METHOD is one of vLLM's, or
`none`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "features"))
from feature_models import COLUMNS, LENGTH, NATIVE, save

from vllm import LLM, SamplingParams

# The second one repeats itself, for n-grams; both are longer than a step reads.
PROMPTS = [[(7 * i * i + 3) % 120 for i in range(70)], [7, 8, 9, 10] * 15, [5, 6]]
NOISE = 0.1  # of a draft's weights, so that some of its tokens are refused


def save_draft(folder: Path, title: str) -> None:
    """The target's weights with some noise."""
    save(folder, BY_TITLE[title], "llama", "float32")
    path = folder / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(7)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator)
        weights[name] = (
            weight + NOISE * weight.std() * noise if weight.dim() > 1 else weight
        )
    save_file(weights, path, metadata={"format": "pt"})


def main(target: str, method: str, draft: str | None = None) -> None:
    options: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if method != "none":
            options = {"method": method, "num_speculative_tokens": 3}
        if method == "ngram":
            options |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
        if draft is not None:
            save_draft(folder / "draft", draft)
            options["model"] = str(folder / "draft")
        save(folder / "target", BY_TITLE[target], "llama", "float32")
        llm = LLM(
            str(folder / "target"),
            dtype="float32",
            max_model_len=LENGTH,
            max_num_batched_tokens=48,
            max_num_seqs=4,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 24,
            disable_log_stats=False,
            speculative_config=options or None,
        )
        params = SamplingParams(temperature=0.0, max_tokens=40, logprobs=0)
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = [
            out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)
        ]
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    found = {
        "tokens": [list(out.token_ids) for out in outputs],
        "logprobs": [
            [
                float(step[token].logprob)
                for step, token in zip(out.logprobs, out.token_ids, strict=True)
            ]
            for out in outputs
        ],
        "proposed": metrics.get("vllm:spec_decode_num_draft_tokens"),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens"),
    }
    print(json.dumps(found), flush=True)


BY_TITLE = {column.title: column for column in (NATIVE, *COLUMNS)}
if __name__ == "__main__":
    main(*sys.argv[1:])
