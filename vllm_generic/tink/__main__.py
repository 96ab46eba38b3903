# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""``python -m vllm_generic.tink serve`` and ``status``."""

import argparse
import logging
import os
import sys
from pathlib import Path

from vllm_generic.tink.settings import (
    Settings,
    default_port,
    default_root,
    default_trainer,
    flag,
    parse_api_keys,
    vllm_urls,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tink", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="train and sample adapters of one model")
    serve.add_argument(
        "model_dir",
        nargs="?",
        type=Path,
        help="directory of a Hugging Face model; without it a tiny one is made",
    )
    serve.add_argument("--model-name", help="the name that clients ask for")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument(
        "--port", type=int, default=default_port(), help="0 takes a free one"
    )
    serve.add_argument(
        "--root", type=Path, default=default_root(), help="for all state"
    )
    serve.add_argument(
        "--adapters-dir", type=Path, help="adapters in files must lie below it"
    )
    serve.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    serve.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="USER=KEY",
        help="may be repeated; also TINK_API_KEYS, separated by commas",
    )
    serve.add_argument(
        "--trainer",
        choices=("module", "megatron", "hf"),
        default=default_trainer(),
        help="the module that vLLM serves; a Megatron model of its weights, also "
        "USE_MEGATRON=true; or Hugging Face and PEFT, also USE_MEGATRON=false",
    )
    serve.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="one pass for the sequences of many runs; by default on a GPU",
    )
    serve.add_argument(
        "--sampler",
        choices=("hf", "vllm", "megatron"),
        default="vllm" if flag(os.environ, "USE_VLLM") else "hf",
        help="also USE_VLLM=true; megatron asks the server at MEGATRON_SERVER_URL",
    )
    serve.add_argument(
        "--max-lora-rank",
        type=int,
        default=int(os.environ.get("VLLM_MAX_LORA_RANK", 32)),
        help="of adapters that vLLM samples from; also VLLM_MAX_LORA_RANK",
    )
    serve.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=Settings.gpu_memory_utilization,
        help="of vLLM's engine; the trainer needs the rest",
    )
    serve.add_argument("--max-queued-training", type=int, default=256)
    serve.add_argument("--max-queued-sampling", type=int, default=2048)
    serve.add_argument(
        "--max-adapters",
        type=int,
        default=int(os.environ.get("VLLM_MAX_LORAS", 8)),
        help="that sample at once; also VLLM_MAX_LORAS",
    )
    status = commands.add_parser("status", help="a table of your runs")
    status.add_argument("--url", default="http://127.0.0.1:8000")
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.command == "status":
        from vllm_generic.tink.status import print_status

        return print_status(arguments.url)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    from vllm_generic.tink.serve import serve

    keys = arguments.api_key or os.environ.get("TINK_API_KEYS", "").split(",")
    serve(
        Settings(
            root=arguments.root.resolve(),
            model_dir=arguments.model_dir,
            adapters_dir=arguments.adapters_dir,
            model_name=arguments.model_name,
            host=arguments.host,
            port=arguments.port,
            api_keys=parse_api_keys([key for key in keys if key]),
            device=arguments.device,
            max_queued_training=arguments.max_queued_training,
            max_queued_sampling=arguments.max_queued_sampling,
            trainer=arguments.trainer,
            packed=arguments.packed,
            sampler=arguments.sampler,
            vllm_urls=tuple(vllm_urls()),
            megatron_url=os.environ.get("MEGATRON_SERVER_URL", Settings.megatron_url),
            max_lora_rank=arguments.max_lora_rank,
            gpu_memory_utilization=arguments.gpu_memory_utilization,
            max_adapters=arguments.max_adapters,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
