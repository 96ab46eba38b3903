# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""On a GPU: bits of an adapter among others, and of an engine beside its trainer.

Each script is a process of its own, because cuBLAS reads its settings before the first
matrix product.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parents[1]

TRAINER = """
import copy
import torch
import lora_adapters as adapters
from tiny_model import trained_model
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer, AdamWParams
from vllm.lora.ops.grouped_product import expand_stack, shrink_stack
from vllm.training.batch_invariance import batch_invariant

product = torch.ops.vllm.lora_grouped_product
with batch_invariant():
    # What an engine computes of a stack, without knowing the rows, and a trainer.
    for dtype in (torch.bfloat16, torch.float16):
        host = torch.tensor([0] * 5 + [-1] * 3 + [2] * 40 + [1] * 9)
        rows, ranks = host.cuda(), torch.tensor([16, 8, 16])
        a = torch.randn(3, 16, 512, device="cuda").to(dtype)
        b = torch.randn(3, 16, 256, device="cuda").to(dtype)
        a[1, 8:], b[1, 8:] = 0, 0
        x = torch.randn(57, 512, device="cuda").to(dtype)
        narrow = shrink_stack(x, rows, a)
        assert torch.equal(narrow, product(x, host, list(a), ranks, True)), dtype
        wide = expand_stack(narrow, rows, b, ranks.cuda())
        assert torch.equal(wide, product(narrow, host, list(b), ranks, False)), dtype

    base = trained_model().cuda().bfloat16()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.2)
    trainer = AdapterTrainer(base)
    for number, name in enumerate("abc"):
        adapters.add(trainer, name, AdapterConfig(4 + 4 * number), number)
    mine = adapters.sequences("b", 30, 7)
    loss = lambda indices, log_probs: -torch.cat(log_probs).sum()
    gradients = []
    for others in ([], adapters.sequences("a", 41) + adapters.sequences("c", 5, 19)):
        trainer.forward_backward(others + mine, loss)
        factors = trainer.adapters["b"].parameters()
        gradients.append([factor.grad.clone() for factor in factors])
        for name in "abc":
            trainer.clear_gradients(name)
    assert all(map(torch.equal, *gradients))
print("= done")
"""

ENGINE = """
import json, sys
from pathlib import Path
import torch
import lora_adapters as adapters
from safetensors.torch import save_file
from tiny_model import CONFIG, TinyModel, trained_model
from vllm import LLM, ModelRegistry
from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer
from vllm.lora.shared_adapters import SharedAdapters
from vllm.training.batch_invariance import batch_invariant

folder = Path(sys.argv[1])
weights = {n: (0.2 * w).bfloat16() for n, w in trained_model().state_dict().items()}
(folder / "config.json").write_text(json.dumps(CONFIG))
save_file(weights, folder / "model.safetensors")
ModelRegistry.register_model("TinyModel", lambda config, context: TinyModel())
llm = LLM(
    str(folder), dtype="bfloat16", max_model_len=128, skip_tokenizer_init=True,
    enable_lora=True, max_loras=3, max_lora_rank=16, kv_cache_memory_bytes=1 << 26,
    max_num_seqs=8, gpu_memory_utilization=0.1,
)
base = TinyModel().cuda().bfloat16()
base.load_state_dict(weights)
shared, requests = SharedAdapters(), {}
with batch_invariant():
    trainer = AdapterTrainer(base)
    targets = ("qkv", "projection", "lm_head", "embedding")
    for number, name in enumerate("abcd", 1):
        config = AdapterConfig(4 * number, target_modules=targets[:number])
        adapters.add(trainer, name, config, number)
        requests[name] = shared.put(trainer.adapters[name], name, number)
    prompts = [[1, 2, 3], list(range(40)), [7], [9, 8, 7, 6], [5] * 33]
    for names in (["a", None, "b", "a", "c"], [None] * 5, ["d"] * 5, list("abcda")):
        difference = adapters.difference(llm, trainer, prompts, names, requests)
        print(names, difference, flush=True)
        assert difference == 0.0, (names, difference)
shared.close()
print("= done")
"""


def _run(script: str, *arguments: str, **environment: str) -> None:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert "= done" in result.stdout, result.stdout[-6000:]


def test_an_adapter_has_the_same_bits_alone_and_among_others() -> None:
    _run(TRAINER)


@pytest.mark.engine
def test_an_engine_has_the_bits_of_its_trainer(tmp_path: Path) -> None:
    """Compiled, in CUDA graphs, ranks mixed, more adapters than slots."""
    _run(ENGINE, str(tmp_path), VLLM_BATCH_INVARIANT="1")
