# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serves public models as they stand, and compares them with their own forward.

    python benchmarks/unchanged_models.py [--only WORD] [--layouts] [--json FILE]
        [--checkouts FOLDER]

Each is built in a tiny shape with random weights by one lambda, in float32, on any
machine. Prompts are longer than a step, so that they are processed in chunks. Prints a
table as docs/models/unchanged.md has it. Libraries that are not installed are left out
by name, as are nanoGPT, minGPT and nanochat, which are on no package index, if their
repositories are not in the folder of `--checkouts`. Each model is run in a process of
its own. With `--layouts` each is served at
TP=2 and at PP=2, by the plans that its library gives it, in place of one rank.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB, LENGTH = 512, 256
PROMPTS = [[1, 2, 3], [(7 * i * i + 3) % 500 for i in range(70)], [9] * 11]

# For models whose config has these names.
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=LENGTH,
    head_dim=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MLA = dict(
    num_key_value_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
GPT2 = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=LENGTH)
OPT = dict(ffn_dim=128, word_embed_proj_dim=64)
LITGPT = dict(
    n_layer=2,
    n_embd=64,
    n_head=2,
    padded_vocab_size=VOCAB,
    block_size=LENGTH,
    intermediate_size=128,
)
TUNE = dict(
    vocab_size=VOCAB,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    embed_dim=64,
    max_seq_len=LENGTH,
)
TUNE_GATED = TUNE | dict(intermediate_dim=128)
MEGATRON = dict(
    normalization="RMSNorm",
    num_query_groups=2,
    add_bias_linear=False,
    gated_linear_unit=True,
)


@dataclass(frozen=True)
class Case:
    """A model of a library.

    Args:
        library: Its name on PyPI.
        name: Of the model.
        build: Builds it, with a `ParallelContext` if it asks for one.
        takes_context: Whether it does.
        reference: Logits `[tokens, vocab]` of a module and ids `[tokens]`; None for the
            module's own forward as `full_forward` calls it.

    """

    library: str
    name: str
    build: Callable[..., Any]
    takes_context: bool = False
    reference: Callable[[Any, Any], Any] | None = None


def hugging_face(name: str, cls: str, **extra: Any) -> Case:
    def build() -> Any:
        import transformers

        shape = extra if name in ("GPT-2",) else SHAPE | extra
        names = {"Gemma3": "Gemma3TextConfig"}  # text alone
        config = getattr(transformers, names.get(cls, f"{cls}Config"))(**shape)
        causal = "LMHeadModel" if cls in ("GPT2",) else "ForCausalLM"
        return getattr(transformers, cls + causal)(config)

    return Case("transformers", name, build)


def litgpt(name: str, config: str, **extra: Any) -> Case:
    def build() -> Any:
        from litgpt.config import Config
        from litgpt.model import GPT

        return GPT(Config.from_name(config, **LITGPT | extra))

    return Case("litgpt", name, build)


def torchtune(name: str, family: str, **extra: Any) -> Case:
    def build() -> Any:
        from importlib import import_module

        builder = getattr(import_module(f"torchtune.models.{family}"), family)
        return builder(**TUNE_GATED | extra)

    return Case("torchtune", name, build)


def torchtitan(
    name: str, family: str, flavor: str = "debugmodel", **extra: Any
) -> Case:
    """The library's own small models, with two layers and a smaller vocabulary."""

    def build() -> Any:
        from importlib import import_module

        models = import_module(f"torchtitan.models.{family}")
        configs = getattr(models, f"{family.replace('_', '')}_configs")
        config = configs[flavor](attn_backend="flex", **extra)
        config.layers = config.layers[:2]
        config.vocab_size = config.tok_embeddings.num_embeddings = VOCAB
        config.lm_head.out_features = VOCAB
        model = config.build()
        model.init_states()
        return model

    return Case("torchtitan", name, build)


def x_transformers(name: str, flash: bool = True, **extra: Any) -> Case:
    def build() -> Any:
        from x_transformers import Decoder, TransformerWrapper

        shape = dict(dim=64, depth=2, heads=2, attn_dim_head=32, attn_flash=flash)
        layers = Decoder(**shape, **extra)
        return TransformerWrapper(
            num_tokens=VOCAB, max_seq_len=LENGTH, attn_layers=layers
        )

    return Case("x-transformers", name, build)


def megatron(name: str, **extra: Any) -> Case:
    """Learned positions, because Megatron's rotary embedding asks for a CUDA device."""

    def build(context: Any = None) -> Any:
        import torch
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        groups = megatron_alone() if context is None else context.megatron_groups()
        config = TransformerConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=128,
            tensor_model_parallel_size=groups.tp.size(),
            pipeline_model_parallel_size=groups.pp.size(),
            pipeline_dtype=torch.float32,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            **extra,
        )
        return GPTModel(
            config,
            get_gpt_layer_local_spec(normalization=config.normalization),
            VOCAB,
            LENGTH,
            parallel_output=False,
            pg_collection=groups,
        )

    return Case("megatron-core", name, build, True, megatron_logits)


def megatron_logits(module: Any, ids: Any) -> Any:
    """With a mask of ours, because Megatron makes its own on a CUDA device only."""
    import torch

    hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)[None, None]
    return module.eval()(ids[None], torch.arange(len(ids))[None], hidden)[0]


def megatron_alone() -> Any:
    """Megatron's groups for the reference, which attends by Megatron's own code."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    initialize_rng_tracker(inference_rng_tracker=True)  # there is no dropout
    if not torch.cuda.is_available():
        # Its attention asks for a CUDA device.
        torch.cuda.current_device = lambda: torch.device("cpu")
    return ProcessGroupCollection.use_mpu_process_groups()


def plain_gpt() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from plain_gpt import PlainConfig, PlainGPT

    return PlainGPT(PlainConfig(vocab_size=VOCAB, context=LENGTH))


def nano_gpt() -> Any:
    from_checkout("nanoGPT")
    from model import GPT, GPTConfig

    return GPT(GPTConfig(LENGTH, VOCAB, n_layer=2, n_head=2, n_embd=64))


def mini_gpt() -> Any:
    from_checkout("minGPT")
    from mingpt.model import GPT

    config = GPT.get_default_config()
    sizes = dict(n_layer=2, n_head=2, n_embd=64, model_type=None)
    config.merge_from_dict(sizes | dict(vocab_size=VOCAB, block_size=LENGTH))
    return GPT(config)


def nano_chat() -> Any:
    from_checkout("nanochat")
    from nanochat.gpt import GPT, GPTConfig

    heads = dict(n_head=2, n_kv_head=1)
    return GPT(GPTConfig(LENGTH, VOCAB, n_layer=2, n_embd=64, **heads))


def from_checkout(repository: str) -> None:
    """Let it be imported, if it is in the folder of `--checkouts`."""
    folders = [Path(folder) / repository for folder in CHECKOUTS]
    sys.path[:0] = [str(folder) for folder in folders if folder.is_dir()]


CHECKOUTS: list[str] = []
CASES = [
    Case("nanoGPT", "GPT", nano_gpt),
    Case("minGPT", "GPT, which writes its attention out", mini_gpt),
    Case("nanochat", "GPT, which looks one token back", nano_chat),
    Case("this repository", "a GPT in plain PyTorch", plain_gpt),
    hugging_face("Llama", "Llama"),
    hugging_face("Qwen3", "Qwen3"),
    hugging_face("GPT-2", "GPT2", **GPT2, bos_token_id=1, eos_token_id=2),
    hugging_face("GPT-NeoX", "GPTNeoX"),
    hugging_face("Phi-3", "Phi3"),
    hugging_face("OLMo-2", "Olmo2"),
    hugging_face("Gemma 2", "Gemma2", sliding_window=16, attn_implementation="eager"),
    hugging_face("Gemma 3", "Gemma3", sliding_window=16),
    hugging_face("gpt-oss", "GptOss", sliding_window=16, **EXPERTS),
    hugging_face("Mixtral", "Mixtral", **EXPERTS),
    hugging_face("Qwen3-MoE", "Qwen3Moe", num_experts=4, num_experts_per_tok=2),
    hugging_face("DeepSeek-V3", "DeepseekV3", **MLA),
    hugging_face("OPT", "OPT", **OPT),
    hugging_face("BLOOM (ALiBi)", "Bloom", n_layer=2, n_head=2),
    hugging_face("Mamba", "Mamba", state_size=8),
    litgpt("Pythia", "pythia-14m"),
    litgpt("Falcon", "falcon-7b", n_query_groups=1),
    litgpt("Gemma 3", "Gemma-3-1b-it", n_query_groups=1, sliding_window_size=16),
    litgpt("Mixtral", "Mixtral-8x7B-v0.1", n_query_groups=1, n_expert=4),
    litgpt("Qwen3", "Qwen3-0.6B", n_query_groups=1, head_size=32),
    torchtune("Llama 3.1", "llama3_1"),
    torchtune("Qwen2", "qwen2"),
    torchtune("Mistral", "mistral"),
    torchtune("Gemma 2", "gemma2", head_dim=32, sliding_window_size=16),
    torchtitan("Llama 3", "llama3"),
    torchtitan("Qwen3", "qwen3"),
    torchtitan("Qwen3-MoE", "qwen3", "debugmodel_moe"),
    torchtitan("DeepSeek-V3", "deepseek_v3", moe_comm_backend="standard"),
    torchtitan("gpt-oss", "gpt_oss", moe_comm_backend="standard"),
    megatron("GPT"),
    megatron("GPT, gated, RMSNorm, grouped queries", **MEGATRON),
    x_transformers("rotary", rotary_pos_emb=True),
    x_transformers("learned positions"),
    x_transformers("ALiBi", alibi_pos_bias=True),
    x_transformers("token shift", rotary_pos_emb=True, shift_tokens=1),
    x_transformers("written-out attention", flash=False, rotary_pos_emb=True),
]


def run(case: Case, ranks: int, stages: int) -> dict[str, Any]:
    """Serve one model, and compare. A process serves it if it has one rank."""
    import torch
    from safetensors.torch import save_file

    from vllm import LLM, ModelRegistry
    from vllm.model_executor.models.adapter import full_forward
    from vllm.model_validation import validate

    # A rank has a key head of its own.
    SHAPE["num_key_value_heads"] = max(SHAPE["num_key_value_heads"], ranks)
    shape = dict(SHAPE)

    def build(vllm_config: Any, context: Any) -> Any:
        SHAPE.update(shape)  # also in a worker
        return case.build(context) if case.takes_context else case.build()

    try:
        module = case.build()
    except ImportError as error:
        return {"left out": f"{case.library} cannot be imported: {first_line(error)}"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    config = SHAPE | {"architectures": ["Unchanged"]}
    declared = {"supports_pp": True} if stages > 1 else {}
    ModelRegistry.register_model("Unchanged", build, **declared)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        seen: set[int] = set()
        state = {}
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                state[name] = tensor.detach().clone().contiguous()
        save_file(state, f"{folder}/model.safetensors")
        try:
            llm = LLM(
                folder,
                dtype="float32",
                max_logprobs=-1,
                skip_tokenizer_init=True,
                max_model_len=LENGTH,
                max_num_batched_tokens=64,
                max_num_seqs=4,
                disable_log_stats=True,
                tensor_parallel_size=ranks,
                pipeline_parallel_size=stages,
            )
        except Exception as error:  # noqa: BLE001 - the refusal is the result
            return {"refused": f"{type(error).__name__}: {first_line(error)}"}
        forward = case.reference or full_forward
        report = validate(llm, lambda ids: forward(module, ids), PROMPTS, max_tokens=16)
        # Only a model in this process can be asked.
        compiled = ranks == stages == 1 and llm.apply_model(is_compiled)[0]
    values = {check.name: check.value for check in report.checks}
    greedy = values["greedy agreement"]
    distance = max(values["max |Δ log p|"], values["prompt max |Δ log p|"])
    return {"greedy": greedy, "distance": distance, "compiled": compiled}


def is_compiled(model: Any) -> bool:
    return not model.do_not_compile


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def run_apart(index: int, ranks: int = 1, stages: int = 1) -> dict[str, Any]:
    where = ["--checkouts", *CHECKOUTS] if CHECKOUTS else []
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks * stages > 1)),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, *where, "--run", *map(str, (index, ranks, stages))],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return json.loads(lines[-1])
    return {"failed": " ".join(done.stderr.split())[-400:]}


def cells(result: dict[str, Any]) -> list[str]:
    """Greedy agreement, distance and whether it was compiled; or why there are none."""
    if "distance" in result:
        compiled = "yes" if result["compiled"] else "no"
        return [f"{result['greedy']:.3f}", f"{result['distance']:.1e}", compiled]
    ((kind, text),) = result.items()
    return [kind, text, "–"]


def version(library: str) -> str:
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models with this in their name")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--layouts", action="store_true", help="at TP=2 and at PP=2")
    parser.add_argument("--run", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--checkouts", type=Path, help="a folder of repositories")
    args = parser.parse_args()
    if args.checkouts is not None:
        CHECKOUTS.append(str(args.checkouts.absolute()))
    if args.run is not None:
        index, *layout = args.run
        print(json.dumps(run(CASES[index], *layout)), flush=True)
        return 0
    rows = []
    titles = ["Library", "Model", "Greedy agreement", "Max abs. Δ log p", "Compiled"]
    if args.layouts:
        titles[2:] = ["TP=2", "PP=2"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for index, case in enumerate(CASES):
        if args.only.lower() not in f"{case.library} {case.name}".lower():
            continue
        result: dict[str, Any]
        if args.layouts:
            result = {"TP=2": run_apart(index, 2, 1), "PP=2": run_apart(index, 1, 2)}
            found = [", ".join(cells(one)[:2]) for one in result.values()]
        else:
            result = run_apart(index)
            found = cells(result)
        row = [version(case.library), case.name, *found]
        print(f"| {' | '.join(row)} |", flush=True)
        rows.append({"library": version(case.library), "model": case.name, **result})
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
