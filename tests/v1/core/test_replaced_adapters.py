# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No request finds blocks that were cached before its adapter was replaced."""

from types import SimpleNamespace

import pytest

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request


@pytest.fixture(autouse=True)
def hashes():
    init_none_hash(sha256)


def make_request(adapter: LoRARequest | None) -> Request:
    return Request(
        "0",
        prompt_token_ids=list(range(8)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        lora_request=adapter,
        block_hasher=get_request_block_hasher(4, sha256),
    )


def add(adapter: LoRARequest, *requests: Request) -> None:
    core = SimpleNamespace(
        scheduler=SimpleNamespace(requests=dict(enumerate(requests))),
        model_executor=SimpleNamespace(add_lora=lambda adapter: True),
    )
    assert EngineCore.add_lora(core, adapter)


def test_replaced_in_place():
    adapter, other = LoRARequest("replaced", 1, "/a"), LoRARequest("other", 2, "/b")
    before = make_request(adapter).block_hashes
    rest = [make_request(None).block_hashes, make_request(other).block_hashes]
    waiting, running = make_request(adapter), make_request(adapter)
    running.num_computed_tokens = 8

    add(adapter, waiting, running)
    assert make_request(adapter).block_hashes == waiting.block_hashes == before

    add(LoRARequest("replaced", 1, "/a", load_inplace=True), waiting, running)
    after = make_request(adapter).block_hashes
    assert len(after) == 2 and not set(after) & set(before)
    assert waiting.block_hashes == after and running.block_hashes == before
    assert [make_request(r).block_hashes for r in (None, other)] == rest
