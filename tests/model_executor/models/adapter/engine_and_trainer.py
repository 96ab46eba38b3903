# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compares an engine and a trainer of one unchanged module on a GPU.

    python engine_and_trainer.py MODEL [--default]

MODEL is one of benchmarks/unchanged_models.py. Prints one line of JSON: of how many
log-probabilities both sides have equal bits, the mean and the largest difference, and
whether the engine runs compiled code. They compute in the exact mode, or with
`--default` as they do by default, the trainer with the module's own attention. It is a
process of its own, because cuBLAS reads its settings before the first matrix product.
"""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

EXACT = "--default" not in sys.argv
os.environ["VLLM_BATCH_INVARIANT"] = str(int(EXACT))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks"))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from unchanged_models import CASES, LENGTH, PROMPTS, SHAPE  # noqa: E402

from vllm import LLM, ModelRegistry, SamplingParams  # noqa: E402
from vllm.model_executor.models.adapter import (  # noqa: E402
    full_forward,
    use_vllm_attention,
)
from vllm.model_executor.models.plans.whole import sum_as_divided  # noqa: E402
from vllm.training.batch_invariance import (  # noqa: E402
    batch_invariant,
    token_log_probs,
)


@torch.no_grad()
def on_gpu(module: nn.Module) -> nn.Module:
    """Parameters in bfloat16; buffers stay in the dtype in which they were computed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:  # [outputs, inputs]
            value *= 1.5 * parameter.shape[-1] ** -0.5
        else:
            value = parameter + 0.1 * value
        parameter.data = value.to("cuda", torch.bfloat16)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.cuda())
    return module.eval()


def equal_and_all(pairs: list[tuple[float, float]]) -> list[int]:
    return [sum(ours == theirs for ours, theirs in pairs), len(pairs)]


def compare(name: str) -> dict[str, Any]:
    build = next(case.build for case in CASES if case.name == name)
    torch.manual_seed(0)
    trainer = on_gpu(build())
    if EXACT:
        trainer = sum_as_divided(use_vllm_attention(trainer))
    ModelRegistry.register_model("Unchanged", lambda vllm_config, context: build())
    with tempfile.TemporaryDirectory() as folder:
        state = {key: w.detach().clone() for key, w in trainer.named_parameters()}
        save_file(state, f"{folder}/model.safetensors")
        config = SHAPE | {"architectures": ["Unchanged"]}
        Path(folder, "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=LENGTH,
            max_num_batched_tokens=64,
            max_num_seqs=4,
            gpu_memory_utilization=0.02,
            kv_cache_memory_bytes=1 << 26,
        )
        params = SamplingParams(
            max_tokens=32, logprobs=0, prompt_logprobs=0, detokenize=False
        )
        params.ignore_eos = True
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        (compiled,) = llm.apply_model(lambda model: not model.do_not_compile)
    sampled, prompted = [], []
    with torch.no_grad():
        for output in outputs:
            prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
            ids = torch.tensor([*prompt, *answer], device="cuda")
            logits = full_forward(trainer, ids)  # [tokens, vocab]
            ours = token_log_probs(logits[:-1], ids[1:]).tolist()
            entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            pairs = [
                (mine, entry[token].logprob)
                for mine, token, entry in zip(
                    ours, ids[1:].tolist(), entries, strict=True
                )
            ]
            prompted += pairs[: len(prompt) - 1]
            sampled += pairs[len(prompt) - 1 :]
    differences = [abs(ours - theirs) for ours, theirs in sampled + prompted]
    return {
        "model": name,
        "sampled": equal_and_all(sampled),
        "prompt": equal_and_all(prompted),
        "mean": mean(differences),
        "largest": max(differences),
        "compiled": compiled,
    }


if __name__ == "__main__":
    with batch_invariant() if EXACT else nullcontext():
        print("\n" + json.dumps(compare(sys.argv[1])), flush=True)
