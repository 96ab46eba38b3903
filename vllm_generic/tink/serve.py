# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starting a service: the model, its backends, the port."""

import logging
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import uvicorn

import vllm.envs as envs
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.training.batch_invariance import batch_invariant
from vllm_generic.tink.app import build_app
from vllm_generic.tink.backends import hf_model
from vllm_generic.tink.backends.base import Sampler, Trainer
from vllm_generic.tink.backends.hf_sampler import HFSampler
from vllm_generic.tink.backends.hf_trainer import HFTrainer
from vllm_generic.tink.backends.module_trainer import ModuleTrainer
from vllm_generic.tink.backends.packed_model import (
    PackedModel,
    WholeModel,
    copy_sharing_parameters,
    pack,
)
from vllm_generic.tink.backends.remote_megatron import RemoteMegatron
from vllm_generic.tink.backends.remote_sampler import Remote, RemoteSampler
from vllm_generic.tink.backends.remote_vllm import RemoteVLLM
from vllm_generic.tink.backends.tiny_model import make_tiny_model
from vllm_generic.tink.backends.vllm_sampler import VLLMSampler
from vllm_generic.tink.service import Service
from vllm_generic.tink.settings import Settings

logger = logging.getLogger(__name__)

TINY_NAME = "tiny/model"


def build_service(settings: Settings) -> Service:
    """Load the model; without one in the settings, the tiny one is made."""
    folder, name = settings.model_dir, settings.model_name
    if folder is None:
        folder = make_tiny_model(settings.root / "tiny_model")
        name = name or TINY_NAME
        # so small a model only loses by sharing its products among threads
        torch.set_num_threads(1)
    base = hf_model.load_base(folder, settings.device)
    module = _module(settings, base)
    return Service(
        settings,
        name or folder.name,
        folder,
        _trainer(settings, base, module),
        _sampler(settings, folder, base, module),
    )


def _module(settings: Settings, base: Any) -> PackedModel | WholeModel | None:
    """Packed, or one sequence at a time by Hugging Face's own code; None if unused."""
    if settings.trainer != "module" and not settings.has_engine:
        return None
    try:
        packed = pack(base)
    except ValueError as error:
        logger.warning("one sequence at a time by Hugging Face instead: %s", error)
        return WholeModel(copy_sharing_parameters(base))
    if envs.VLLM_BATCH_INVARIANT:
        # The engine divides sums by the model's own tp_plan, also on one rank.
        sum_as_divided(packed)
    return packed


def _trainer(
    settings: Settings, base: Any, module: PackedModel | WholeModel | None
) -> Trainer:
    """A trainer of the settings' kind.

    It and a sampler have modules of their own, so that neither waits for the other; the
    frozen weights are the same tensors.
    """
    if settings.trainer == "hf":
        return HFTrainer(copy_sharing_parameters(base))
    packed = settings.packed
    if packed is None:
        packed = settings.device != "cpu"
    if settings.trainer == "megatron":
        from vllm_generic.tink.backends.megatron_trainer import MegatronTrainer

        return MegatronTrainer(base, packed)
    assert module is not None
    return ModuleTrainer(module, packed and isinstance(module, PackedModel))


def _sampler(
    settings: Settings,
    folder: Path,
    base: Any,
    module: PackedModel | WholeModel | None,
) -> Sampler:
    from transformers import AutoTokenizer

    if settings.has_engine and isinstance(module, PackedModel):
        return VLLMSampler(folder, settings)
    local = HFSampler(
        base,
        copy_sharing_parameters(module)
        if isinstance(module, PackedModel)
        else WholeModel(base),
        AutoTokenizer.from_pretrained(folder),
        settings.max_adapters,
    )
    if settings.sampler == "hf" or settings.has_engine:
        return local
    remote: Remote
    if settings.sampler == "megatron":
        remote = RemoteMegatron(
            settings.megatron_url, local.tokenizer, local.max_length
        )
    else:
        remote = RemoteVLLM(settings.vllm_urls, settings.max_adapters)
    return RemoteSampler(remote, local)


def serve(settings: Settings) -> None:
    """Run a service until it is stopped by a signal."""
    with ExitStack() as stack:
        if envs.VLLM_BATCH_INVARIANT:
            # before the first matrix product, as cuBLAS reads its settings once
            stack.enter_context(batch_invariant())
        _serve(settings)


def _serve(settings: Settings) -> None:
    sock = socket.create_server((settings.host, settings.port), backlog=2048)
    port = sock.getsockname()[1]
    service = build_service(settings)
    config = uvicorn.Config(
        build_app(service),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    logger.info(
        "tink serves %s on http://%s:%d, state in %s",
        service.model_name,
        settings.host,
        port,
        settings.root,
    )
    uvicorn.Server(config).run(sockets=[sock])
