# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a service is set up: from the command line and the environment."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

TRUE = {"1", "true", "yes", "on"}


def flag(environment: Mapping[str, str], name: str, default: bool = False) -> bool:
    value = environment.get(name)
    return default if value is None else value.strip().lower() in TRUE


def vllm_urls(value: str | None = None) -> list[str]:
    """Of ``value`` or VLLM_BASE_URL: servers, separated by commas; none without it."""
    value = value or os.environ.get("VLLM_BASE_URL", "")
    return [url.strip() for url in value.split(",") if url.strip()]


def default_port() -> int:
    """8000, unless vLLM is there on this machine."""
    taken = {
        parts.port
        for parts in map(urlsplit, vllm_urls())
        if parts.hostname in {"localhost", "127.0.0.1", "::1"}
    }
    return next(port for port in itertools.count(8000) if port not in taken)


def default_trainer() -> str:
    """By USE_MEGATRON; without it the module that vLLM serves."""
    if "USE_MEGATRON" not in os.environ:
        return "module"
    return "megatron" if flag(os.environ, "USE_MEGATRON") else "hf"


def default_root() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tink"


@dataclass(frozen=True)
class Settings:
    root: Path
    model_dir: Path | None = None
    adapters_dir: Path | None = None  # root / adapters if None
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    # key -> user; with none, every key is taken, and each is a user of its own
    api_keys: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    trainer: str = "module"  # or "megatron", or "hf"
    packed: bool | None = None  # by default on a GPU
    sampler: str = "hf"  # or "vllm", or "megatron"
    megatron_url: str = "http://localhost:5000"  # of a text-generation server
    vllm_urls: tuple[str, ...] = ()  # of servers; without, an engine in this process
    max_queued_training: int = 256  # requests of one run
    max_queued_sampling: int = 2048  # requests of all samplers
    max_body_bytes: int = 64 * 1024 * 1024
    max_adapters: int = 8
    max_lora_rank: int = 32  # of adapters that vLLM samples from
    # of the engine in this process; the trainer has the rest
    gpu_memory_utilization: float = 0.5
    long_poll_seconds: float = 30.0  # the client gives up after 45
    idle_seconds: float = 3600.0  # until a run's adapter is unloaded
    keep_results_seconds: float = 3600.0
    keep_samplers_seconds: float = 86400.0  # of a session without heartbeats

    @property
    def has_engine(self) -> bool:
        """Whether vLLM's engine is to run in this process."""
        return self.sampler == "vllm" and not self.vllm_urls

    @property
    def adapters_root(self) -> Path:
        return self.adapters_dir or self.root / "adapters"


def parse_api_keys(values: list[str]) -> dict[str, str]:
    """Keys as "key" or "user=key"; a key without a user is a user of its own."""
    keys: dict[str, str] = {}
    for value in values:
        user, _, key = value.rpartition("=")
        keys[key] = user or f"user{len(keys) + 1}"
    return keys
