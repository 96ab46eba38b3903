# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines on two nodes of Ray, both on this machine; one node is killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from soft_model import soft_model, worst_difference
from tiny_model import TinyModel

from vllm_generic.rollout import Episode, VLLMModule

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = 32


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes with room for an engine each."""
    memory = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **memory)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def two_turns(episode: Episode) -> int:
    await episode.sample(max_tokens=10)
    episode.give([7])
    await episode.sample(max_tokens=10)
    return len(episode.token_ids)


def test_a_node_is_killed_in_the_middle_of_episodes(
    model_dir_with_tokenizer: Path, cluster: Cluster
) -> None:
    model = soft_model(0)
    save_file(model.state_dict(), model_dir_with_tokenizer / "model.safetensors")
    keys: dict[str, Any] = {"model": str(model_dir_with_tokenizer), "dtype": "float32"}
    keys |= {"ray_engines": 2, "temperature": 0.7, "n": 2, "max_new_tokens": 20}
    keys |= {"timeout": 120, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
    # The callable travels with Ray; nothing is registered on its nodes.
    module = VLLMModule(keys, lambda vllm_config, parallel_context: TinyModel())
    module.setup()
    try:
        assert not ray.available_resources().get("CPU")  # an engine on each node
        data = {"input_ids": [[i, i + 1] for i in range(PROMPTS)]}
        batch = module.forward_step(data)
        assert worst_difference(model, batch, 0.7) <= 1e-4

        model = soft_model(1)
        assert module.parameter_sync(model) == 1
        expected = module.run_episodes(two_turns, data, timeout=120)
        assert worst_difference(model, expected, 0.7) <= 1e-4
        sampled = expected["loss_mask"] > 0
        assert (expected["weight_versions"][sampled] == 1).all()

        victim = cluster.list_all_nodes()[-1]
        begun = 0

        async def play(episode: Episode) -> int:
            nonlocal begun
            begun += 1
            if begun == PROMPTS:  # half of all
                cluster.remove_node(victim, allow_graceful=False)
            return await two_turns(episode)

        assert not module.engine.has_changed()
        again = module.run_episodes(play, data, timeout=120)
        assert module.engine.has_changed()
        assert again["all_tokens"].tolist() == expected["all_tokens"].tolist()
        assert again["results"] == expected["results"]

        # The next update reaches the engine that is left, and numbers go on.
        model = soft_model(2)
        assert module.parameter_sync(model) == 2
        batch = module.forward_step(data)
        assert worst_difference(model, batch, 0.7) <= 1e-4
        assert (batch["weight_versions"][batch["loss_mask"] > 0] == 2).all()
    finally:
        module.close()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 1:  # of the node that is left
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ray_has_no_room(model_dir: Path, cluster: Cluster) -> None:
    keys: dict[str, Any] = {"model": str(model_dir), "ray_engines": 1, "timeout": 3}
    keys["ray_options"] = {"resources": {"absent": 1}}
    module = VLLMModule(keys, lambda vllm_config, parallel_context: TinyModel())
    with pytest.raises(TimeoutError, match="asks for .*'absent': 1"):
        module.setup()
