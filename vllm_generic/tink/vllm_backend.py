# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Functions for a worker that samples from vLLM servers and their LoRA adapters.

The servers are ``vllm serve`` or ``trl vllm-serve``, started with ``--enable-lora`` and
``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``. All functions may be called from any thread.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_generic.tink.backends.vllm_servers import VLLMServers
from vllm_generic.tink.settings import flag, vllm_urls

DEFAULT_URL = "http://localhost:8000"

_lock = threading.Lock()
_servers: VLLMServers | None = None
_trl: Any = None


def _urls(config: Mapping[str, Any]) -> list[str]:
    value = config.get("base_url")
    if value is None or isinstance(value, str):
        return vllm_urls(value) or [DEFAULT_URL]
    return list(value)


def initialize_vllm_client(config: Mapping[str, Any] | None = None) -> VLLMServers:
    """Connect to ``config["base_url"]`` or VLLM_BASE_URL, which may name several
    servers, separated by commas. A second call makes new connections."""
    global _servers
    servers = VLLMServers(_urls(config or {}))
    with _lock:
        if _servers is not None:
            _servers.close()
        _servers = servers
    return servers


def _connected() -> VLLMServers:
    servers = _servers
    return initialize_vllm_client() if servers is None else servers


def generate_with_vllm(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    lora_adapter_id: str | None = None,
    max_tokens: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    **options: Any,
) -> list[str]:
    """One text for each prompt; ``options`` are those of ``/v1/completions``."""
    servers = _connected()
    if lora_adapter_id is not None and lora_adapter_id not in servers.adapters:
        raise ValueError(
            f"LoRA adapter {lora_adapter_id!r} is not registered; registered are "
            f"{sorted(servers.adapters)}"
        )
    body = options | {
        "model": lora_adapter_id or servers.model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }

    def one(prompt: Any) -> str:
        asked = body | {"prompt": prompt}
        answer = servers.least_busy(
            lambda url: servers.request("POST", url, "/v1/completions", json=asked)
        )
        return answer.json()["choices"][0]["text"]

    if not prompts:
        return []
    with ThreadPoolExecutor(min(len(prompts), 64)) as pool:
        return list(pool.map(one, prompts))


def register_lora_adapter(adapter_id: str, lora_path: str) -> None:
    """Load a PEFT adapter on every server, in place of one of the same name."""
    if not Path(lora_path).is_dir():
        raise ValueError(f"LoRA path does not exist: {lora_path!r}")
    servers = _connected()
    body: dict[str, Any] = {"lora_name": adapter_id, "lora_path": lora_path}
    if adapter_id in servers.adapters:
        body["load_inplace"] = True
    servers.everywhere("/v1/load_lora_adapter", json=body)
    servers.adapters[adapter_id] = lora_path


def unregister_lora_adapter(adapter_id: str) -> None:
    servers = _connected()
    if servers.adapters.pop(adapter_id, None) is None:
        raise ValueError(f"LoRA adapter {adapter_id!r} is not registered")
    servers.everywhere("/v1/unload_lora_adapter", json={"lora_name": adapter_id})


def list_lora_adapters() -> dict[str, str]:
    """The path of each registered adapter."""
    return dict(_connected().adapters)


def get_client_info() -> dict[str, Any]:
    """Whether there is a connection, and to what."""
    servers = _servers
    return {
        "initialized": servers is not None,
        "base_urls": _urls({}) if servers is None else servers.urls,
        "model": None if servers is None else servers.model,
        "lora_enabled": flag(os.environ, "VLLM_ENABLE_LORA"),
        "lora_adapters": [] if servers is None else sorted(servers.adapters),
    }


def _trl_client() -> Any:
    """TRL's client of the first server, which transfers the base model's weights."""
    global _trl
    with _lock:
        if _trl is None:
            try:
                from trl.generation.vllm_client import VLLMClient
            except ImportError as error:
                raise ImportError(
                    "vLLM is not available: pip install vllm requests, and trl"
                ) from error
            _trl = VLLMClient(base_url=_urls({})[0])
        return _trl


def init_communicator(device: Any = 0) -> None:
    """Join the server's weight-transfer group, which needs a GPU."""
    _trl_client().init_communicator(device)


def update_model_weights(model: Any) -> None:
    """Send all parameters of a module to the server."""
    _trl_client().update_model_params(model)


def close_communicator() -> None:
    _trl_client().close_communicator()


def reset_prefix_cache() -> None:
    """On every server; they must run with VLLM_SERVER_DEV_MODE=1."""
    _connected().everywhere("/reset_prefix_cache")
