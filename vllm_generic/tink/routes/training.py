# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models, their training requests, and their weights."""

import asyncio
import json
import secrets
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from vllm_generic.tink import requests
from vllm_generic.tink import training as ops
from vllm_generic.tink.backends.base import LoraSpec
from vllm_generic.tink.codec import parse_batch
from vllm_generic.tink.errors import UserError, require_base_model
from vllm_generic.tink.routes.common import RawBody, ServiceOf, User
from vllm_generic.tink.service import Service

router = APIRouter()


def _check_optimizer(config: dict[str, Any] | None) -> None:
    if config is not None and config.get("type", "adamw") != "adamw":
        raise UserError(f"the optimizer {config['type']!r} is not available; use adamw")


@router.post("/create_model")
async def create_model(
    body: requests.CreateModel, service: ServiceOf, user: User
) -> dict[str, Any]:
    require_base_model(body.base_model, service.model_name)
    _check_optimizer(body.optimizer_config)
    lora = body.lora_config
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise UserError("one of train_attn, train_mlp and train_unembed must be true")
    canonical = body.canonical()
    # kept with the run, so that a restored one begins with the same values
    seed = secrets.randbits(31) if lora.seed is None else lora.seed
    spec = LoraSpec(**(lora.model_dump() | {"seed": seed}))
    request_id, run = service.runs.create(
        owner=user,
        session_id=body.session_id,
        model_seq_id=body.model_seq_id,
        base_model=body.base_model,
        spec=spec,
        metadata=body.user_metadata,
        kind=ops.CREATE,
        body=canonical,
    )
    service.scheduler.wake()
    return {"request_id": request_id, "model_id": run.id}


@router.post("/get_info")
async def get_info(
    body: requests.ModelBody, service: ServiceOf, user: User
) -> dict[str, Any]:
    run = service.runs.get(body.model_id, user)
    return {
        "type": "get_info",
        "model_id": run.id,
        "model_data": {
            "arch": service.trainer.architecture,
            "model_name": run.base_model,
            "tokenizer_id": service.tokenizer_id,
        },
        "is_lora": True,
        "lora_rank": run.spec.rank,
        "model_name": run.base_model,
    }


def _submit(
    service: Service, user: str, model_id: str, seq: int, kind: str, body: bytes
) -> dict[str, Any]:
    request_id = service.runs.submit(user, model_id, seq, kind, body)
    service.scheduler.wake()
    return {"request_id": request_id, "model_id": model_id}


@router.post("/forward_backward")
async def forward_backward(
    body: RawBody, service: ServiceOf, user: User
) -> dict[str, Any]:
    request = await asyncio.to_thread(parse_batch, body)
    # the order of a map's entries is not part of a request
    canonical = await asyncio.to_thread(request.SerializeToString, deterministic=True)
    return _submit(
        service,
        user,
        request.model_id,
        request.seq_id,
        ops.FORWARD_BACKWARD,
        canonical,
    )


@router.post("/optim_step")
async def optim_step(
    body: requests.OptimStep, service: ServiceOf, user: User
) -> dict[str, Any]:
    return _submit(
        service, user, body.model_id, body.seq_id, ops.OPTIM_STEP, body.canonical()
    )


async def _save(
    kind: str, body: requests.SaveWeights, service: Service, user: str
) -> dict[str, Any]:
    return _submit(service, user, body.model_id, body.seq_id, kind, body.canonical())


@router.post("/save_weights")
async def save_weights(
    body: requests.SaveWeights, service: ServiceOf, user: User
) -> dict[str, Any]:
    return await _save(ops.SAVE, body, service, user)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    body: requests.SaveWeights, service: ServiceOf, user: User
) -> dict[str, Any]:
    return await _save(ops.SAVE_SAMPLER, body, service, user)


@router.post("/save_weights_external")
async def save_weights_external(
    body: requests.SaveWeights, service: ServiceOf, user: User
) -> dict[str, Any]:
    return await _save(ops.SAVE_EXTERNAL, body, service, user)


@router.post("/load_weights")
async def load_weights(
    body: requests.LoadWeights, service: ServiceOf, user: User
) -> dict[str, Any]:
    """Into a model, or into a new one, whose adapter is as the checkpoint's."""
    checkpoint = service.store.checkpoint(body.path, user)
    if checkpoint["kind"] != "weights":
        raise UserError(
            f"{body.path!r} is for sampling; load what save_state has written"
        )
    if body.model_id is not None and body.seq_id is not None:
        return _submit(
            service, user, body.model_id, body.seq_id, ops.LOAD, body.canonical()
        )
    if body.session_id is None or body.model_seq_id is None:
        raise UserError(
            "load_weights needs model_id and seq_id, or session_id and model_seq_id"
        )
    _check_optimizer(body.optimizer_config)
    if body.base_model is not None:
        require_base_model(body.base_model, service.model_name)
    request_id, run = service.runs.create(
        owner=user,
        session_id=body.session_id,
        model_seq_id=body.model_seq_id,
        base_model=service.model_name,
        spec=LoraSpec(**json.loads(checkpoint["spec"])),
        metadata=body.user_metadata,
        kind=ops.LOAD,
        body=body.canonical(),
    )
    service.scheduler.wake()
    return {"request_id": request_id, "model_id": run.id}


@router.post("/weights_info")
async def weights_info(
    body: requests.WeightsInfo, service: ServiceOf, user: User
) -> dict[str, Any]:
    row = service.store.checkpoint(body.tinker_path, user)
    spec = LoraSpec(**json.loads(row["spec"]))
    return {
        "base_model": service.model_name,
        "is_lora": True,
        "lora_rank": spec.rank,
        **{key: value for key, value in asdict(spec).items() if "train_" in key},
    }
