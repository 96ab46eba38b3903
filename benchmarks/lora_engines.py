# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines that sample with adapters, each in a process of its own, for `lora.py`."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Child, generation_rate, random_prompts
from llama import Llama, LlamaShape

RANK = 16
NATIVE = "LlamaForCausalLM"


class Engine(Child):
    """A child that answers each line of JSON."""

    def __init__(self, **options: Any) -> None:
        super().__init__(__file__, json.dumps(options))

    def wait(self) -> None:
        """Raises RuntimeError if it does not start."""
        self.answer()

    def rate(self, adapters: int) -> float:
        """New tokens a second, of all requests at once, with as many adapters."""
        return self.ask(json.dumps({"adapters": adapters}))

    def loading_time(self) -> float:
        """Seconds to save an adapter and make it known to the engine."""
        return self.ask(json.dumps({"load": True}))


def _adapters(directory: Path, module: Any, count: int) -> list[Any]:
    """Requests of adapters of all linear layers but the head, with values."""
    import torch

    from vllm.lora.adapter import Adapter
    from vllm.lora.adapter_config import AdapterConfig
    from vllm.lora.request import LoRARequest
    from vllm.lora.sites import find_sites
    from vllm.model_executor.parallel_context import ParallelContext

    sites = find_sites(module, ParallelContext())
    adapter = Adapter.start(AdapterConfig(RANK), sites, seed=0)
    for factor in adapter.parameters():
        factor.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    adapter.factors = {
        name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in adapter.factors.items()
    }
    requests = []
    for number in range(1, count + 1):
        adapter.save(directory / str(number))
        requests.append(LoRARequest(str(number), number, str(directory / str(number))))
    return requests


def _module(native: bool, shape: LlamaShape) -> Any:
    """Without weights, for the names and widths of its layers."""
    import torch

    with torch.device("meta"):
        if not native:
            return Llama(shape)
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = {k: v for k, v in shape.config(NATIVE).items() if k != "torch_dtype"}
        return AutoModelForCausalLM.from_config(LlamaConfig(**config))


def serve(
    native: bool,
    slots: int,
    shape: dict[str, Any],
    tokens: tuple[int, int],
    at_once: int,
    kv_cache_gb: float,
) -> None:
    """Start one engine; `slots` of 0 is one without LoRA."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    import torch

    from vllm import LLM, ModelRegistry
    from vllm.lora.adapter import Adapter
    from vllm.lora.request import LoRARequest

    llama = LlamaShape(**shape)
    architecture = NATIVE if native else "PlainLlama"
    if not native:
        ModelRegistry.register_model(architecture, lambda c, p: Llama(llama))
    options: dict[str, Any] = {}
    if slots:
        options = {
            "enable_lora": True,
            "max_loras": slots,
            "max_lora_rank": RANK,
            "max_cpu_loras": 64,
        }
    if torch.cuda.is_available():
        # Engines start side by side, so none may measure what is free.
        options |= {
            "kv_cache_memory_bytes": int(kv_cache_gb * 2**30),
            "gpu_memory_utilization": 0.1,  # this has to be free at the start
            "compilation_config": {"cudagraph_capture_sizes": [1, 8, 64, at_once]},
        }
    else:
        options["gpu_memory_utilization"] = 0.2  # of the host's memory
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        config = folder / "config.json"
        config.write_text(json.dumps(llama.config(architecture)))
        requests = []
        if slots:
            requests = _adapters(folder, _module(native, llama), 64)
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=2 * sum(tokens),
            max_num_seqs=at_once,
            enable_prefix_caching=False,
            **options,
        )
        print("= 0", flush=True)
        prompts = random_prompts(llama.vocab_size, tokens[0], at_once)
        for line in sys.stdin:
            command = json.loads(line)
            if "load" in command:
                adapter = Adapter.load(requests[0].lora_path)
                begin = time.perf_counter()
                adapter.save(folder / "new")
                llm.llm_engine.add_lora(LoRARequest("new", 99, str(folder / "new")))
                print(f"= {time.perf_counter() - begin}", flush=True)
                continue
            count = command["adapters"]
            chosen = None
            if count:
                chosen = [requests[i % count] for i in range(at_once)]
            rate = generation_rate(llm, prompts, tokens[1], lora_request=chosen)
            print(f"= {rate}", flush=True)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
