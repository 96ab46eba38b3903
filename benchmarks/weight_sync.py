# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Time of a weight update, from a trainer's module to a committed engine.

    python benchmarks/weight_sync.py --size 8b
    python benchmarks/weight_sync.py --size 8b --two-gpus
    python benchmarks/weight_sync.py --size 300m --device cpu

`WeightSync` with and without staging, vLLM's own backends in the same run, and how fast
the machine copies the same bytes. Each engine runs in processes of its own, after the
other. Times are medians of rounds after the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import host, last_json, median_seconds
from llama import LLAMA_1B, LLAMA_8B, Llama, LlamaShape

SHAPES = {
    "1m": replace(
        LLAMA_1B,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=2048,
    ),
    "300m": replace(
        LLAMA_1B, hidden_size=1024, intermediate_size=4096, vocab_size=32000
    ),
    "1b": LLAMA_1B,
    "8b": LLAMA_8B,
}
KINDS = (
    "ours",
    "ours unstaged",
    "ours shared",
    "ours changed",
    "ours network",
    "ipc",
    "nccl",
    "gloo broadcast",
    "stall",
    "copies",
)


def factory(shape: LlamaShape) -> Callable[..., Llama]:
    return lambda vllm_config, parallel_context: Llama(shape, parallel_context)


def engine_options(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 256 << 20,
        "tensor_parallel_size": args.tensor_parallel_size,
        "gpu_memory_utilization": 0.4,  # the trainer may be on the same GPU
    }
    if args.device == "cpu" or args.eager:
        options["enforce_eager"] = True
    return options


def trainer_of(args: argparse.Namespace, dtype: str = "bfloat16") -> Llama:
    device = args.device
    if device == "cuda":
        device = "cuda:1" if args.two_gpus else "cuda:0"
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(SHAPES[args.size]).to(getattr(torch, dtype))
    return model.requires_grad_(False)


def nbytes_of(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def step(model: torch.nn.Module) -> None:
    """Something that changes every weight."""
    for parameter in model.parameters():
        parameter.mul_(0.999)


def change_a_few(model: torch.nn.Module, number: int) -> None:
    """One of 50 elements, as a step at the learning rates of RL changes of bfloat16."""
    for parameter in model.parameters():
        parameter.view(-1)[number::50] *= 1.5


def run_ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed.weight_sync import WeightSync

    model = trainer_of(args)
    llm = LLM(**engine_options(args, folder))
    unstaged = args.child in ("ours unstaged", "ours shared")
    if args.child == "ours shared":
        model.share_memory()
    sync = WeightSync(
        model,
        llm,
        staging="none" if unstaged else "shard",
        transport="network" if args.child == "ours network" else "auto",
    )
    changed_only = args.child == "ours changed"
    for _ in range(2 if changed_only else 0):
        sync.update(changed_only=True)
    times, copies = [], []
    # What else the machine does changes by the minute: a CPU copies in turns.
    there = [p.clone() for p in model.parameters()] if args.device == "cpu" else []
    for number in range(args.rounds + 1):
        if changed_only:
            change_a_few(model, number)
        begin = time.perf_counter()
        sync.update(changed_only=changed_only)
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        if there:
            copies.append(copy_by_one_thread(model, there))
    sent = sync.sent_bytes
    step(model)
    sync.update()
    sync.close()
    found = {"seconds": statistics.median(times[1:]), "bytes": nbytes_of(model)}
    if there:
        found["copy"] = statistics.median(copies[1:])
        found["of copy"] = statistics.median(
            copy / seconds for copy, seconds in zip(copies[1:], times[1:], strict=True)
        )
    return found | {"sent": sent}


def copy_by_one_thread(model: torch.nn.Module, there: list[torch.Tensor]) -> float:
    """Seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    for target, parameter in zip(there, model.parameters(), strict=True):
        target.copy_(parameter)
    seconds = time.perf_counter() - begin
    torch.set_num_threads(threads)
    return seconds


def run_peer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """vLLM's backend, with its own trainer's side."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.utils.network_utils import get_open_port

    model = trainer_of(args)
    weights = model.checkpoint()

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(n, w.dtype, tuple(w.shape)) for n, w in weights.items()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(weights.items())

    # vLLM's ipc sends handles that only pickle can carry.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    config = WeightTransferConfig(backend=args.child)
    llm = LLM(**engine_options(args, folder), weight_transfer_config=config)

    class Client:
        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            llm.init_weight_transfer_engine({"init_info": init_info})

        def start_weight_update(self) -> None:
            llm.start_weight_update()

        def update_weights(self, update_info: dict[str, Any]) -> None:
            llm.update_weights({"update_info": update_info})

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            llm.finish_weight_update()

    if args.child == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info: Any = IPCTrainerInitInfo(rank=0, packed=True)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address="127.0.0.1",
            master_port=get_open_port(),
            world_size=1 + args.tensor_parallel_size,
            rank=0,
            packed=True,
        )
    engine = WeightTransferTrainerFactory.trainer_init(
        info, client=Client(), source=Source()
    )
    seconds = median_seconds(engine.send_weights, args.rounds, True)
    return {"seconds": seconds, "bytes": nbytes_of(model)}


class Broadcasts:
    """A worker's side of a broadcast by gloo and `load_weights`."""

    def receive_broadcast(self, port: int, metas: list[tuple[str, list[int]]]) -> None:
        if not hasattr(self, "_broadcast_group"):
            self._broadcast_group = gloo_group(port, rank=1)
        received = []
        for name, shape in metas:
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            self._broadcast_group.broadcast(tensor, 0).wait()
            received.append((name, tensor))
        self.get_model().load_weights(received)  # type: ignore[attr-defined]


def gloo_group(port: int, rank: int) -> Any:
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(
        "127.0.0.1", port, rank, 2, "gloo"
    )


def run_gloo(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a trainer does on a CPU today: broadcast each tensor, and load them."""
    import threading

    from vllm import LLM
    from vllm.utils.network_utils import get_open_port

    model = trainer_of(args)
    weights = model.checkpoint()
    metas = [(name, list(weight.shape)) for name, weight in weights.items()]
    llm = LLM(
        **engine_options(args, folder),
        worker_extension_cls="weight_sync.Broadcasts",
    )
    port = get_open_port()
    groups: list[Any] = []

    def update() -> None:
        receiver = threading.Thread(
            target=llm.collective_rpc, args=("receive_broadcast", None, (port, metas))
        )
        receiver.start()
        if not groups:
            groups.append(gloo_group(port, rank=0))
        for weight in weights.values():
            groups[0].broadcast(weight.contiguous(), 0).wait()
        receiver.join()

    return {
        "seconds": median_seconds(update, args.rounds, False),
        "bytes": nbytes_of(model),
    }


def run_stall(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The longest gap between two tokens of a request, with updates and without."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.distributed.weight_sync import WeightSync
    from vllm.v1.engine.async_llm import AsyncLLM

    model = trainer_of(args)

    async def gaps(engine: AsyncLLM, name: str, done: asyncio.Event) -> list[float]:
        params = SamplingParams(
            max_tokens=480, ignore_eos=True, temperature=0, detokenize=False
        )
        times = []
        number = 0
        while not done.is_set():
            number += 1
            prompt = {"prompt_token_ids": [5, 6, 7]}
            last = time.perf_counter()
            first = True
            async for _ in engine.generate(prompt, params, f"{name}{number}"):
                now = time.perf_counter()
                if not first:
                    times.append(now - last)
                last, first = now, False
                if done.is_set():
                    break
        return times

    async def measure() -> dict[str, Any]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**engine_options(args, folder))
        )
        sync = WeightSync(model, engine, mode="keep")
        await asyncio.to_thread(sync.update)
        # Windows of equal length take turns: the longest gap grows with a window.
        longest: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * args.rounds):
            updates = number % 2 == 1
            done = asyncio.Event()
            task = asyncio.create_task(gaps(engine, f"round{number}-", done))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(sync.update if updates else lambda: time.sleep(0.1))
            await asyncio.sleep(0.3)
            done.set()
            longest[updates].append(max(await task))
        sync.close()
        engine.shutdown()
        return {
            "longest gap": statistics.median(longest[True]),
            "without": statistics.median(longest[False]),
        }

    return asyncio.run(measure())


def run_copies(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds to copy the model's bytes: within memory, and from GPU to GPU."""
    model = trainer_of(args)
    size = nbytes_of(model)
    source = next(model.parameters())
    parts = [torch.empty_like(p) for p in model.parameters()]

    def copy(targets: list[torch.Tensor]) -> None:
        for target, parameter in zip(targets, model.parameters(), strict=True):
            target.copy_(parameter)

    cuda = source.is_cuda
    torch.set_num_threads(1)
    found = {
        "bytes": size,
        "copy": median_seconds(lambda: copy(parts), args.rounds, cuda),
    }
    if args.two_gpus:
        del parts
        there = [torch.empty_like(p, device="cuda:0") for p in model.parameters()]

        def peer_copy() -> None:
            copy(there)
            torch.cuda.synchronize("cuda:0")

        found["peer copy"] = median_seconds(peer_copy, args.rounds, cuda)
    return found


RUNNERS = {
    "ours": run_ours,
    "ours unstaged": run_ours,
    "ours shared": run_ours,
    "ours changed": run_ours,
    "ours network": run_ours,
    "ipc": run_peer,
    "nccl": run_peer,
    "gloo broadcast": run_gloo,
    "stall": run_stall,
    "copies": run_copies,
}


def run_child(args: argparse.Namespace) -> None:
    """One measurement; its result is the last line."""
    from vllm import ModelRegistry

    shape = SHAPES[args.size]
    ModelRegistry.register_model("SyncedLlama", factory(shape))
    with tempfile.TemporaryDirectory() as folder:
        config = shape.config("SyncedLlama") | {"model_type": "synced"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        print(json.dumps(RUNNERS[args.child](args, Path(folder))), flush=True)
    os._exit(0)  # some backends wait for their peer at exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--two-gpus", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return
    names = {"cpu": ("ipc", "nccl"), "cuda": ("gloo broadcast", "ours shared")}[
        args.device
    ]
    found: dict[str, Any] = {}
    for kind in args.kinds:
        if kind in names or (kind == "ipc" and args.two_gpus):
            continue  # not for this device
        if kind == "nccl" and not args.two_gpus:
            continue  # NCCL has one rank a GPU
        found[kind] = measure(kind, args.timeout)
        print(kind, found[kind], flush=True)
        if args.json:  # after each, as they take minutes
            options = {
                "size": args.size,
                "device": args.device,
                "two_gpus": args.two_gpus,
                "rounds": args.rounds,
            }
            content = {"host": host(), "options": options, "results": found}
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    report(found)


def measure(kind: str, timeout: float) -> dict[str, Any]:
    """What a child process of this command measures, or how it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind]
    try:
        child = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no result in {timeout:.0f} s"}
    if child.returncode:
        return {"failed": child.returncode}
    return last_json(child.stdout)


def report(found: dict[str, Any]) -> None:
    """A table: seconds, GB/s, and the ratio to ours."""
    ours = found.get("ours", {}).get("seconds")
    print(f"{'':16} {'ms':>9} {'GB/s':>8} {'/ ours':>7}")
    for kind, result in found.items():
        for name, seconds in result.items():
            if name in ("bytes", "failed", "sent", "of copy"):
                continue
            label = kind if name == "seconds" else name
            rate = (
                f"{result['bytes'] / seconds / 1e9:8.1f}" if "bytes" in result else ""
            )
            ratio = f"{seconds / ours:7.2f}" if ours and "bytes" in result else ""
            print(f"{label:16} {1e3 * seconds:9.1f} {rate:>8} {ratio:>7}")


if __name__ == "__main__":
    main()
