# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which failures of an update leave a mixture, and what ends it."""

import pytest
import torch.distributed as dist
from ranks import run_ranks

from vllm.model_executor.parameters.update import UpdateState

TENSORS = [frozenset({"a"}), frozenset({"b", "tied"}), frozenset({"c"})]
ALL = {"a", "b", "c"}


@pytest.fixture
def update():
    return UpdateState(TENSORS)


def load(update, *names):
    update.begin_load()
    update.finish_load(set(names))


def fail(update, *written):
    update.begin_load()
    update.fail_load(ValueError("1 surplus: x."), set(written))


def test_a_refusal_changes_nothing(update):
    fail(update)
    assert update.problem() is None
    assert not update.has_new()


def test_a_refusal_in_the_middle_of_an_update(update):
    load(update, "a")
    fail(update)
    assert update.problem() == (
        "The model's weights are a mixture of old and new ones, because an update "
        "failed half-way: ValueError: 1 surplus: x. Not loaded since: a, b, c. Load "
        "all weights, as by collective_rpc('reload_weights'), to serve again."
    )


def test_a_refusal_in_the_next_update(update):
    load(update, "a")
    update.end()
    fail(update)
    assert update.problem() is None


def test_a_refusal_after_a_complete_update(update):
    load(update, *ALL)
    fail(update)
    assert update.problem() is None


def test_every_tensor_ends_it_by_any_of_its_names(update):
    fail(update, "a")
    load(update, "a", "tied")
    update.end()
    assert "Not loaded since: c." in update.problem()
    load(update, "c")
    assert update.problem() is None


def test_one_that_does_not_say_what_it_wrote(update):
    update.begin_load()
    update.fail_load(OSError("gone"), written=None)
    assert "OSError: gone" in update.problem()


def one_rank_fails(context):
    rank, group = dist.get_rank(), dist.group.WORLD
    update = UpdateState(TENSORS)
    update.begin_load()
    if rank == 0:
        update.finish_load(ALL)
    else:
        update.fail_load(OSError("gone"), set())
    assert "OSError: gone. Not loaded since: a, b, c." in update.agree(group)
    update.end()
    load(update, *ALL)
    assert update.agree(group) is None
    update.end()
    fail(update)  # on all ranks, before anything has changed
    assert update.agree(group) is None


def test_ranks_with_an_engine_each_agree(tmp_path):
    run_ranks(one_rank_fails, tmp_path, 2)
