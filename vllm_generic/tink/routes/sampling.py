# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Samplers and samples."""

from typing import Any

from fastapi import APIRouter

from vllm_generic.tink import requests, texts
from vllm_generic.tink.routes.common import ServiceOf, User

router = APIRouter()


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: requests.CreateSamplingSession, service: ServiceOf, user: User
) -> dict[str, Any]:
    key = service.sampling.create(user, body)
    return {"type": "create_sampling_session", "sampling_session_id": key}


@router.get("/samplers/{sampler_id}")
async def get_sampler(
    sampler_id: str, service: ServiceOf, user: User
) -> dict[str, Any]:
    row = service.store.get("samplers", sampler_id, user)
    return {
        "sampler_id": sampler_id,
        "base_model": service.model_name,
        "model_path": row["model_path"],
    }


@router.post("/asample")
async def asample(
    body: requests.Sample | requests.TextSample, service: ServiceOf, user: User
) -> dict[str, Any]:
    """Tinker's request for samples, or one with texts."""
    if isinstance(body, requests.TextSample):
        return {"request_id": texts.submit_sample(service, user, body)}
    request_id = service.sampling.submit(user, body)
    return {
        "request_id": request_id,
        "sample_sequence_ids": [
            f"{request_id}/{index}" for index in range(body.num_samples)
        ],
    }
