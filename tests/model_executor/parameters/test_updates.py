# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights that change while an engine serves: each way to load, each kind of shards.

After an update the engine has to compute what the same weights compute in the plain
reference; after one that failed, what they computed before, or nothing.
"""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from update_models import (
    KINDS,
    addresses,
    buckets,
    constants,
    load_and_fail,
    load_iterator,
    load_on_one_rank,
    load_parts,
    load_sparse,
    one_by_one,
    reload_iterator,
    shuffled,
)

from vllm.config import WeightTransferConfig

pytestmark = pytest.mark.engine


# What TP=2, or another kind, covers as well.
MORE_ALONE = ["tied", "vllm"]


def check_updates(served):
    old, new = served.old, served.new
    served.assert_serves(old)
    before = served.apply(addresses)

    served.reload(weights_path=str(served.folder / "new"))
    served.assert_serves(new)
    served.llm.collective_rpc(partial(reload_iterator, weights=shuffled(old)))
    served.assert_serves(old)
    served.apply(load_parts, parts=one_by_one(new))
    served.assert_serves(new)
    served.apply(load_iterator, weights=shuffled(old))
    served.assert_serves(old)
    served.llm.sleep(level=1)  # a CPU frees nothing; requests and caches are dropped
    served.llm.wake_up(tags=["weights"])
    served.apply(load_parts, parts=buckets(new, 3))
    served.llm.wake_up()
    served.assert_serves(new)

    assert served.apply(addresses) == before
    assert served.apply(constants) == [[0.5, -0.5]] * len(before)
    served.reload(weights_path=str(served.folder / "old"))


def check_transfer(served):
    """Parts between start and finish, as vLLM's weight transfer has them."""
    old, new = served.old, served.new
    llm, path = served.llm, str(served.folder / "new" / "model.safetensors")
    names = [name for name, _ in shuffled(new)]
    llm.start_weight_update()
    for part in (names[:5], names[5:]):
        llm.update_weights({"update_info": {"path": path, "names": part}})
    llm.finish_weight_update()
    served.assert_serves(new)

    llm.start_weight_update()
    llm.finish_weight_update()  # nothing came
    served.assert_serves(new)

    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": path, "names": names[:5]}})
    with pytest.raises(Exception, match="unknown"):
        llm.update_weights({"update_info": {"path": path, "names": ["unknown"]}})
    served.assert_refuses("unknown")
    served.reload(weights_path=str(served.folder / "old"))
    served.assert_serves(old)


def check_failures(served):
    """They end no engine, and nothing but whole weights is served."""
    old, new = served.old, served.new
    served.assert_serves(old)
    vllm_layers = "layers.1.qkv.weight" in new
    name = "layers.1." + ("qkv" if vllm_layers else "attention.q_proj")
    wrong = (f"{name}.bias", torch.ones(3))
    misshaped = f"mis-shaped: {name}.bias"

    with pytest.raises(Exception, match=misshaped):
        served.apply(load_parts, parts=[[*new.items(), wrong]])
    served.assert_serves(old)  # refused before anything was written

    with pytest.raises(Exception, match=misshaped):
        served.apply(load_parts, parts=[*one_by_one(new)[:3], [wrong]])
    served.assert_refuses(misshaped)
    served.apply(load_parts, parts=one_by_one(old)[3:])
    served.assert_refuses(misshaped)
    served.apply(load_parts, parts=one_by_one(old))
    served.assert_serves(old)

    if vllm_layers or "layers.1.mlp.experts.0.up_proj.weight" in new:
        # Packed, so that no old values are left.
        with pytest.raises(Exception, match="A sparse patch came for .*packed"):
            served.apply(load_sparse, weights=shuffled(new), old=old)
    else:
        served.apply(load_sparse, weights=shuffled(new), old=old)
        served.assert_serves(new)
        served.apply(load_parts, parts=one_by_one(old))
    served.assert_serves(old)

    with pytest.raises(Exception, match="the file system went away"):
        served.apply(load_and_fail, weights=shuffled(new)[:3])
    served.assert_refuses("the file system went away")
    served.reload(weights_path=str(served.folder / "new"))
    served.assert_serves(new)

    incomplete = shuffled({n: t for n, t in old.items() if n != wrong[0]})
    save_file(dict(incomplete), served.folder / "new" / "model.safetensors")
    with pytest.raises(Exception, match=f"1 missing: {wrong[0]}"):
        served.reload(weights_path=str(served.folder / "new"))
    served.assert_refuses("1 missing")
    served.reload(weights_path=str(served.folder / "old"))
    served.assert_serves(old)


def check_failure_of_one_rank(served):
    """Its weights are old, and no load failed on the ranks with the new ones."""
    with pytest.raises(Exception, match="the file system is gone"):
        served.apply(load_on_one_rank, weights=list(served.new.items()))
    served.assert_refuses("the file system is gone")
    served.apply(load_parts, parts=[list(served.new.items())])
    served.assert_serves(served.new)


@pytest.mark.parametrize(
    "kind",
    [
        *(k for k in KINDS if k not in MORE_ALONE),
        *(pytest.param(k, marks=pytest.mark.slow) for k in MORE_ALONE),
    ],
)
def test_alone(serve, kind):
    served = serve(kind)
    check_updates(served)
    check_failures(served)


@pytest.mark.parametrize(
    "kind",
    [
        "vllm",
        *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "vllm"),
    ],
)
def test_tensor_parallel(serve, kind, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for apply_model
    served = serve(
        kind,
        processes=True,
        tensor_parallel_size=2,
        weight_transfer_config=WeightTransferConfig(backend="file"),
    )
    check_updates(served)
    check_transfer(served)
    check_failures(served)
    check_failure_of_one_rank(served)
