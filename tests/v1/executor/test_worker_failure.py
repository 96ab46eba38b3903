# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import threading

import pytest

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor import worker_failure
from vllm.v1.executor.multiproc_executor import WorkerProc

SUCCESS = WorkerProc.ResponseStatus.SUCCESS
FAILURE = WorkerProc.ResponseStatus.FAILURE
A = (SUCCESS, "a")


@pytest.fixture
def queues():
    """Two ranks' ends and the executor's ends of their queues."""
    ranks = [MessageQueue(1, 1) for _ in range(2)]
    executor = [MessageQueue.create_from_handle(q.export_handle(), 0) for q in ranks]
    for queue in ranks + executor:
        queue.wait_until_ready()
    return ranks, executor


def answers(executor):
    return [worker_failure.dequeue(queue, executor, 30) for queue in executor]


def test_answers_are_in_the_order_of_ranks(queues):
    ranks, executor = queues
    ranks[1].enqueue((SUCCESS, "b"))
    ranks[0].enqueue(A)
    assert answers(executor) == [A, (SUCCESS, "b")]


def test_a_failure_behind_a_rank_that_says_nothing(queues):
    ranks, executor = queues
    error = worker_failure.with_rank(MemoryError("no room"), 1)
    ranks[1].enqueue((FAILURE, str(error)))
    expected = (FAILURE, "MemoryError on worker rank 1: no room")
    assert worker_failure.dequeue(executor[0], executor, None) == expected


def test_an_answer_that_comes_early_is_kept(queues):
    ranks, executor = queues
    ranks[1].enqueue((SUCCESS, "b"))
    late = threading.Timer(1.5 * worker_failure.PATIENCE_S, ranks[0].enqueue, [A])
    late.start()
    assert answers(executor) == [A, (SUCCESS, "b")]
    late.join()


@pytest.mark.parametrize("failing", [0, 1])
def test_answers_to_a_call_that_failed_are_not_those_of_the_next(queues, failing):
    ranks, executor = queues
    ranks[failing].enqueue((FAILURE, "no room"))
    assert worker_failure.dequeue(executor[0], executor, 30) == (FAILURE, "no room")
    ranks[1 - failing].enqueue((SUCCESS, "of the call that failed"))
    for rank, answer in zip(ranks, [A, (SUCCESS, "b")], strict=True):
        rank.enqueue(answer)
    assert answers(executor) == [A, (SUCCESS, "b")]


def test_answers_that_come_too_late(queues):
    ranks, executor = queues
    ranks[1].enqueue((SUCCESS, "of the call that ended"))
    with pytest.raises(TimeoutError):
        worker_failure.dequeue(executor[0], executor, 0.2)
    ranks[0].enqueue((SUCCESS, "of the call that ended"))
    for rank, answer in zip(ranks, [A, (SUCCESS, "b")], strict=True):
        rank.enqueue(answer)
    assert answers(executor) == [A, (SUCCESS, "b")]
