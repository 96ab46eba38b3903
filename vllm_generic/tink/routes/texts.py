# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The smaller API: sample, fwdbwd, optim and lora."""

from typing import Any

from fastapi import APIRouter

from vllm_generic.tink import requests, texts
from vllm_generic.tink.routes.common import ServiceOf, User

router = APIRouter()


@router.post("/sample")
async def sample(
    body: requests.TextSample, service: ServiceOf, user: User
) -> dict[str, Any]:
    return await texts.sample(service, user, body)


@router.post("/fwdbwd")
async def fwdbwd(
    body: requests.TextBatch, service: ServiceOf, user: User
) -> dict[str, Any]:
    return await texts.forward_backward(service, user, body)


@router.post("/optim")
async def optim(
    body: requests.TextOptim, service: ServiceOf, user: User
) -> dict[str, Any]:
    return await texts.optim_step(service, user, body)


@router.post("/lora")
async def create_lora(
    body: requests.Lora, service: ServiceOf, user: User
) -> dict[str, Any]:
    """Register PEFT files, or make an adapter to train."""
    if body.lora_path is not None:
        return {"adapter_id": texts.register_lora(service, user, body)}
    model_id = texts.create_lora(service, user, body)
    return {"adapter_id": model_id, "model_id": model_id}


@router.get("/lora")
async def list_loras(service: ServiceOf, user: User) -> dict[str, Any]:
    return {"adapters": texts.list_loras(service, user)}


@router.delete("/lora/{adapter_id:path}", status_code=204)
async def unregister_lora(adapter_id: str, service: ServiceOf, user: User) -> None:
    texts.unregister_lora(service, user, adapter_id)
