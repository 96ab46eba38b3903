# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A smaller API: texts in and out, and a model's requests numbered by the service."""

import asyncio
import json
import time
import uuid
from typing import Any

import numpy as np

from vllm_generic.tink import requests, wire
from vllm_generic.tink import training as ops
from vllm_generic.tink.backends.base import Batch, Datum, LoraSpec, SampleJob, Version
from vllm_generic.tink.checkpoints import confined
from vllm_generic.tink.codec import encode_batch
from vllm_generic.tink.errors import NotFoundError, UserError
from vllm_generic.tink.runs import Run
from vllm_generic.tink.sampling import sampling_params
from vllm_generic.tink.service import Service
from vllm_generic.tink.store import FAILED


def _session(owner: str) -> str:
    """One session for each user, whose models have no client that numbers requests."""
    return f"texts-{owner}"


def create_lora(service: Service, owner: str, request: requests.Lora) -> str:
    """A new adapter to train; answers its model id."""
    session, now = _session(owner), time.time()
    if service.store.find("sessions", session) is None:
        service.store.insert(
            "sessions",
            id=session,
            owner=owner,
            created=now,
            last_seen=now,
            metadata="null",
        )
    lora = request.lora_config
    seed = uuid.uuid4().int % 2**31 if lora.seed is None else lora.seed
    _, run = service.runs.create(
        owner=owner,
        session_id=session,
        model_seq_id=len(service.store.of_session("runs", session)),
        base_model=service.model_name,
        spec=LoraSpec(**(lora.model_dump() | {"seed": seed})),
        metadata=None,
        kind=ops.CREATE,
        body=request.canonical(),
    )
    service.scheduler.wake()
    return run.id


def register_lora(service: Service, owner: str, request: requests.Lora) -> str:
    """Make a PEFT adapter in files known under a name."""
    assert request.lora_path is not None
    name = request.adapter_id or request.lora_path
    folder = confined(service.settings.adapters_root, request.lora_path)
    if not folder.is_dir():
        raise UserError(f"LoRA path does not exist: {request.lora_path!r}")
    if not (folder / "adapter_config.json").exists():
        raise UserError(
            f"{request.lora_path!r} has no adapter_config.json; save the adapter with "
            "PEFT's save_pretrained"
        )
    service.store.put_adapter(owner, name, str(folder))
    return name


def list_loras(service: Service, owner: str) -> list[dict[str, Any]]:
    files = [
        {"adapter_id": row["name"], "lora_path": row["folder"]}
        for row in service.store.adapters(owner)
    ]
    trained = service.store.of_session("runs", _session(owner))
    return files + [{"adapter_id": row["id"], "lora_path": None} for row in trained]


def unregister_lora(service: Service, owner: str, name: str) -> None:
    if not service.store.delete_adapter(owner, name):
        raise NotFoundError(f"adapter {name!r} does not exist")


def _own_run(service: Service, owner: str, model_id: str) -> Run:
    run = service.runs.get(model_id, owner)
    if run.session_id != _session(owner):
        raise UserError(
            f"{model_id!r} is trained by a Tinker client, which numbers its requests; "
            "sample from a path that it has saved"
        )
    return run


async def _finish(
    service: Service, owner: str, run: Run, kind: str, body: dict[str, Any] | Batch
) -> bytes:
    """Carry out the next request of a run; answers its result."""
    seq = run.next_seq
    if isinstance(body, Batch):
        encoded = encode_batch(run.id, seq, body)
    else:
        encoded = json.dumps(body | {"model_id": run.id, "seq_id": seq}).encode()
    key = service.runs.submit(owner, run.id, seq, kind, encoded)
    service.scheduler.wake()
    row = None
    while row is None:
        row = await service.futures.wait(key, owner, timeout=60)
    if row["state"] == FAILED:
        raise UserError(json.loads(row["result"])["error"])
    return row["result"]


def _datum(service: Service, item: requests.TextDatum) -> Datum:
    tokens = item.tokens
    if tokens is None:
        tokens = service.sampling.sampler.tokenizer.encode(item.text or "")
    if len(tokens) < 2:
        raise UserError("a datum needs text or tokens, at least two tokens long")
    ids = np.asarray(tokens, np.int64)
    weights = np.asarray(item.weights or [1.0] * (len(ids) - 1), np.float32)
    return Datum(ids[:-1], {"target_tokens": ids[1:], "weights": weights})


async def forward_backward(
    service: Service, owner: str, request: requests.TextBatch
) -> dict[str, Any]:
    run = _own_run(service, owner, request.model_id)
    data = [_datum(service, item) for item in request.data]
    batch = Batch(data, "cross_entropy")
    body = await _finish(service, owner, run, ops.FORWARD_BACKWARD, batch)
    output = wire.ForwardBackwardOutput.FromString(body)
    return {"model_id": run.id, "metrics": dict(output.metrics)}


async def optim_step(
    service: Service, owner: str, request: requests.TextOptim
) -> dict[str, Any]:
    run = _own_run(service, owner, request.model_id)
    body = {"adam_params": request.adam_params.model_dump()}
    result = json.loads(await _finish(service, owner, run, ops.OPTIM_STEP, body))
    return {"model_id": run.id, **result}


async def _version(
    service: Service, owner: str, model_id: str | None
) -> Version | None:
    """The weights that a model id means: the base, files, a checkpoint, or a run."""
    if model_id is None or model_id == service.model_name:
        return None
    if model_id.startswith("tinker://"):
        return service.sampling.checkpoint_version(model_id, owner)
    for row in service.store.adapters(owner):
        if row["name"] == model_id:
            folder = confined(service.settings.adapters_root, row["folder"])
            return Version(f"{folder}@{row['created']}", folder)
    run = _own_run(service, owner, model_id)
    # a name that the next sample of this run takes again
    body = {"path": "current", "overwrite": True}
    result = json.loads(await _finish(service, owner, run, ops.SAVE_SAMPLER, body))
    return service.sampling.checkpoint_version(result["path"], owner)


async def sample(
    service: Service, owner: str, request: requests.TextSample
) -> dict[str, Any]:
    """One completion for each prompt."""
    version = await _version(service, owner, request.model_id)
    sampler = service.sampling.sampler
    params = sampling_params(request.sampling_params)
    jobs = []
    for prompt in request.prompts:
        tokens = sampler.tokenizer.encode(prompt)
        if not 0 < len(tokens) < sampler.max_length:
            raise UserError(
                f"a prompt has {len(tokens)} tokens; expected 1 to "
                f"{sampler.max_length - 1}"
            )
        jobs.append(SampleJob(tokens, params))
    outputs = await asyncio.gather(*(sampler.sample(version, job) for job in jobs))
    completions = []
    for job, output in zip(jobs, outputs, strict=True):
        (sequence,) = output.sequences
        completions.append(
            {
                "text": sampler.tokenizer.decode(
                    sequence.tokens, skip_special_tokens=True
                ),
                "prompt_ids": job.prompt,
                "completion_ids": sequence.tokens,
                "logprobs": sequence.logprobs,
                "stop_reason": "stop" if sequence.stopped else "length",
            }
        )
    return {"model_id": request.model_id, "completions": completions}


def submit_sample(service: Service, owner: str, request: requests.TextSample) -> str:
    """Sample in the background; answers the request's id for retrieve_future."""
    queue = f"texts-{uuid.uuid4().hex}"
    service.futures.add(owner, queue, 0, "texts", request.canonical())
    key = f"{queue}/0"

    async def finish() -> None:
        try:
            service.futures.finish_json(key, await sample(service, owner, request))
        except Exception as error:
            service.futures.fail_with(key, error)

    service.background(finish())
    return key
