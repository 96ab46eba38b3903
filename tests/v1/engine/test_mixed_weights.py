# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What an engine does between a failed update of the weights and one that heals it."""

from types import SimpleNamespace

import pytest

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.mixed_weights import (
    MixedWeightsError,
    WeightsGuard,
    raise_refusals,
)


class Model:
    """A rank's; `load` stands for what a loader would note."""

    def __init__(self) -> None:
        self.progress = (False, False)
        self.problem = None

    def load(self, everything=True):
        self.progress = (True, everything)
        if everything:
            self.problem = None

    def update_progress(self):
        return self.progress

    def mark_mixed(self, reason):
        self.problem = reason

    def require_update(self, why):
        self.problem = why

    def weights_problem(self):
        self.progress = (False, False)
        return self.problem


class Engine:
    """Two ranks, and a scheduler of requests of two clients."""

    def __init__(self, **additional_config) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)
        self.ranks = [Model(), Model()]
        self.model_executor = self.scheduler = self
        self.pause_state = PauseState.UNPAUSED
        self.requests = []
        self.steps = 0
        self.asked = 0
        self.guard = WeightsGuard(self, self.step)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self.asked += 1
        workers = [SimpleNamespace(get_model=lambda m=m: m) for m in self.ranks]
        return [method(worker, *args) for worker in workers]

    def sleep(self, level):
        self.slept = level

    def has_unfinished_requests(self):
        return bool(self.requests)

    def get_request_counts(self):
        return 0, len(self.requests)

    def finish_requests(self, request_ids, status):
        ended, self.requests = self.requests, []
        return ended

    def step(self):
        self.steps += len(self.requests)
        return {0: EngineCoreOutputs(outputs=[EngineCoreOutput("done", [1])])}, True

    def add_requests(self):
        self.requests = [
            SimpleNamespace(request_id=name, client_index=client)
            for client, name in enumerate("ab")
        ]

    def call(self, function):
        """A user's call to all workers."""
        self.guard.collective_rpc(function, None, (), None)

    def fails_on(self, failing, load=None):
        """A call that fails on some ranks and loads on the others."""
        ranks = iter(range(2))

        def function(worker):
            rank = next(ranks)
            if rank not in failing and load:
                load(worker.get_model())
            if rank == 1:
                raise OSError("no file")

        with pytest.raises(OSError, match="no file"):
            self.call(function)


@pytest.fixture
def engine():
    return Engine()


def refused(engine):
    """What each client is told, and that no batch had requests."""
    engine.add_requests()
    before = engine.steps
    outputs, _ = engine.guard.step()
    reasons = {
        client: output.stop_reason
        for client, batch in outputs.items()
        for output in batch.outputs
        if output.finish_reason == FinishReason.ERROR
    }
    assert bool(reasons) == (engine.steps == before)
    engine.requests = []
    return reasons


def test_whole_weights_are_served_and_asked_for_once(engine):
    engine.call(lambda worker: worker.get_model().load())
    assert refused(engine) == {}
    asked = engine.asked
    assert refused(engine) == {}
    assert engine.asked == asked


def test_a_call_that_fails_before_anything_changed(engine):
    engine.fails_on({0, 1})
    assert refused(engine) == {}


def test_a_rank_that_fails_alone(engine):
    engine.fails_on({1}, Model.load)
    assert refused(engine) == dict.fromkeys((0, 1), "OSError: no file")
    assert refused(engine) == dict.fromkeys((0, 1), "OSError: no file")
    engine.call(lambda worker: worker.get_model().load(everything=False))
    assert len(refused(engine)) == 2
    engine.call(lambda worker: worker.get_model().load())
    assert refused(engine) == {}


def test_a_later_call_does_not_hide_the_failure(engine):
    engine.fails_on({1}, Model.load)
    engine.call(lambda worker: None)
    assert len(refused(engine)) == 2


def test_a_failure_after_a_complete_update(engine):
    engine.call(lambda worker: worker.get_model().load())
    engine.fails_on({0, 1})
    assert refused(engine) == {}


def test_weights_in_kernel_format_are_written_unseen(engine):
    def method(*_):
        raise RuntimeError("of another size")

    engine.collective_rpc, ask = method, engine.collective_rpc
    with pytest.raises(RuntimeError, match="of another size"):
        engine.guard.collective_rpc(
            "reload_weights", None, (), {"is_checkpoint_format": False}
        )
    engine.collective_rpc = ask
    assert refused(engine) == dict.fromkeys((0, 1), "RuntimeError: of another size")


@pytest.mark.parametrize("state", [PauseState.PAUSED_ALL, PauseState.PAUSED_NEW])
def test_requests_wait_while_the_engine_is_paused(engine, state):
    engine.fails_on({1}, Model.load)
    engine.pause_state = state
    engine.add_requests()
    outputs, _ = engine.guard.step()
    assert len(engine.requests) == 2
    assert [output.request_id for output in outputs[0].outputs] == ["done"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_that_drops_the_weights(engine, level):
    engine.guard.sleep(level)
    assert engine.slept == level
    told = refused(engine)
    assert len(told) == (0 if level == 1 else 2)
    assert all("sleep of level 2" in reason for reason in told.values())
    engine.call(lambda worker: worker.get_model().load(everything=False))
    assert len(refused(engine)) == (0 if level == 1 else 2)
    engine.call(lambda worker: worker.get_model().load())
    assert refused(engine) == {}


def test_an_engine_that_is_to_wait_for_its_first_update():
    engine = Engine(require_weight_update=True)
    assert all("require_weight_update" in why for why in refused(engine).values())
    assert len(refused(engine)) == 2
    engine.call(lambda worker: worker.get_model().load())
    assert refused(engine) == {}
    assert refused(Engine(require_weight_update=False)) == {}


class Processor:
    """The front-end's, with a request that a task waits for, and one without."""

    def __init__(self, queue) -> None:
        state = SimpleNamespace(queue=queue, parent_req=None)
        self.request_states = {"a": state, "b": state}

    def abort_requests(self, request_ids, internal):
        for request_id in request_ids:
            del self.request_states[request_id]


REFUSED = EngineCoreOutput("a", [], finish_reason=FinishReason.ERROR, stop_reason="why")


def test_llm_raises(engine):
    processor = Processor(queue=None)
    with pytest.raises(MixedWeightsError, match="^why$"):
        raise_refusals(processor, [REFUSED])
    assert processor.request_states == {}


def test_a_task_gets_the_error_of_its_request():
    errors = []
    processor = Processor(SimpleNamespace(put=errors.append))
    other = EngineCoreOutput("b", [1])
    assert raise_refusals(processor, [REFUSED, other]) == [other]
    assert [str(error) for error in errors] == ["why"]
    assert processor.request_states.keys() == {"b"}


def test_other_errors_are_left_alone():
    output = EngineCoreOutput("a", [], finish_reason=FinishReason.ERROR)
    assert raise_refusals(Processor(None), [output]) == [output]
