# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Serve a whole Megatron-core GPTModel with vLLM, and prove it equal to Megatron.

The model is Megatron's from its embedding to its output layer. Only the attention
inside each layer is `CoreAttention`, which also trains. As the proof, a second process
runs the unchanged GPTModel, with Megatron's own attention on whole sequences,
and has to agree with every token that vLLM serves.

    python examples/offline_inference/custom_model_with_megatron.py
    python examples/offline_inference/custom_model_with_megatron.py \
        --tensor-parallel-size 2 --pipeline-parallel-size 2

To see the comparison fail, change a weight of the served checkpoint:

    python examples/offline_inference/custom_model_with_megatron.py \
        --corrupt decoder.layers.0.mlp.linear_fc2.weight
"""
# ruff: noqa: E402

import argparse
import functools
import json
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that it starts sooner
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # for TP on one socket
warnings.filterwarnings("ignore", module=r"(megatron|vllm)\.")
sys.path.append(str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from english_corpus import read_paragraphs, train_tokenizer
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import ModuleSpec, TransformerConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vllm import LLM, ModelRegistry
from vllm.model_executor.layers.trainable_attention import packed_sequences
from vllm.model_executor.layers.trainable_attention.megatron import CoreAttention
from vllm.model_validation import validate

CONFIG = {
    "architectures": ["MegatronGPT"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
}


# ---- The model ----------------------------------------------------------------


class FlatGPTModel(GPTModel):
    """GPTModel on flattened tokens; vLLM finds `output_layer` by its name."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden]` of `input_ids` `[tokens]`.

        On a later pipeline stage `inputs_embeds` is what the stage before returned.
        """
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids.unsqueeze(0), positions.unsqueeze(0))
        else:
            self.set_input_tensor(inputs_embeds.unsqueeze(1))
        return self.decoder(embedded, attention_mask=None).squeeze(1)


def layer_spec(core_attention: type | None = None) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    return spec


def build(
    model_cls: type[GPTModel],
    spec: ModuleSpec,
    config,  # with the attributes of CONFIG
    groups: ProcessGroupCollection,
) -> GPTModel:
    transformer_config = TransformerConfig(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=groups.pp.size(),
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
    )
    return model_cls(
        transformer_config,
        spec,
        config.vocab_size,
        config.max_position_embeddings,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        pg_collection=groups,
    )


def served_model(vllm_config, parallel_context) -> FlatGPTModel:
    """The registered factory, which gives vLLM's process groups to Megatron."""
    model = build(
        FlatGPTModel,
        layer_spec(CoreAttention),
        vllm_config.model_config.hf_config,
        parallel_context.megatron_groups(),
    )
    assert not parallel_state.model_parallel_is_initialized()  # no global state
    return model


# ---- Plain Megatron, in a process of its own ------------------------------------


def start_megatron() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    initialize_rng_tracker(inference_rng_tracker=True)  # there is no dropout
    # Megatron's own attention asks for a CUDA device; this process stays on the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.manual_seed(0)


def train(directory: Path, steps: int) -> float:
    """Train the model that will be served, and save it. Returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.eos_token.join(read_paragraphs())
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = SimpleNamespace(**CONFIG)
    model = build(FlatGPTModel, layer_spec(CoreAttention), config, groups)

    seq, batch = config.max_position_embeddings, 8
    positions = torch.arange(seq).repeat(batch)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * seq
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - seq, (batch,))
        chunks = torch.stack([tokens[s : s + seq + 1] for s in starts])
        with packed_sequences(cu_seqlens):
            hidden = model(chunks[:, :-1].flatten(), positions)
            logits, _ = model.output_layer(hidden)
            loss = F.cross_entropy(logits, chunks[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    state = {k: v for k, v in model.state_dict().items() if v is not None}
    save_file(state, directory / "model.safetensors")
    return loss.item()


@functools.cache
def reference_model(directory: Path) -> GPTModel:
    """Megatron's unchanged model, with its own attention."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = SimpleNamespace(**json.loads((directory / "config.json").read_text()))
    model = build(GPTModel, layer_spec(), config, groups).eval()
    weights = load_file(directory / "model.safetensors")
    lacking, surplus = model.load_state_dict(weights, strict=False)
    assert not surplus and all(name.endswith("_extra_state") for name in lacking)
    return model


@torch.inference_mode()
def reference_logits(directory: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[seq, vocab]` of one whole sequence `[seq]`."""
    seq = len(token_ids)
    positions = torch.arange(seq).unsqueeze(0)
    hidden_from = torch.ones(seq, seq, dtype=torch.bool).triu(1)[None, None]
    return reference_model(directory)(token_ids[None], positions, hidden_from)[0]


# ---- Train, serve, compare ------------------------------------------------------


def corrupt(directory: Path, name: str) -> Path:
    """A copy of the checkpoint with one weight tensor 1 % too large."""
    copy = directory / "corrupted"
    copy.mkdir(exist_ok=True)
    for file in directory.glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    if name not in weights:
        raise SystemExit(f"No weight is named {name!r}, but {', '.join(weights)}.")
    weights[name] *= 1.01
    save_file(weights, copy / "model.safetensors")
    return copy


def main(args: argparse.Namespace) -> int:
    directory: Path = args.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    paragraphs = read_paragraphs()
    tokenizer = train_tokenizer(paragraphs, CONFIG["vocab_size"], directory)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    step = len(paragraphs) // args.num_prompts
    prompts = [tokenizer(text)["input_ids"][:24] for text in paragraphs[::step]]
    prompts = prompts[: args.num_prompts]

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=start_megatron) as megatron:
        print(f"Training a Megatron GPTModel for {args.train_steps} steps ...")
        loss = megatron.submit(train, directory, args.train_steps).result()
        print(f"Loss {loss:.2f}. Serving it with vLLM ...")

        ModelRegistry.register_model("MegatronGPT", served_model, supports_pp=True)
        served = corrupt(directory, args.corrupt) if args.corrupt else directory
        llm = LLM(
            model=str(served),
            tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size,
            dtype="float32",
            max_logprobs=-1,  # for the KL over the whole vocabulary
            enforce_eager=True,
            kv_cache_memory_bytes=256 << 20,
            use_tqdm_on_load=False,
        )
        report = validate(
            llm,
            lambda ids: megatron.submit(reference_logits, directory, ids).result(),
            prompts,
            max_tokens=args.max_tokens,
        )
    report.print_table()
    if args.json:
        report.write_json(args.json)
    return report.exit_code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--train-steps", type=int, default=250)
    parser.add_argument("--output-dir", type=Path, default=Path("build/megatron"))
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--corrupt", metavar="NAME", help="weight to make 1 %% larger")
    sys.exit(main(parser.parse_args()))
