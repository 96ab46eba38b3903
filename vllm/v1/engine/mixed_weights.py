# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine whose weights cannot be served refuses its requests.

An update may fail half-way, on one rank or on all; a sleep of level 2 gives the weights
up; an engine may have been told to wait for its first update. The engine then stays
alive and answers each request with the reason, until all weights have been loaded.

Only the model knows what was loaded. One that takes part has four methods:

- `weights_problem() -> str | None` is called on every rank before the first step after
  an update, and says why the weights cannot be served;
- `update_progress() -> tuple[bool, bool]`: whether anything, and whether everything was
  loaded since the last such call;
- `mark_mixed(reason: str) -> None`: the update failed on some rank, after something had
  changed on one;
- `require_update(why: str) -> None`: none of the weights may be served, and `why` is a
  sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

try:
    from vllm.exceptions import GracefulHTTPError
except ImportError:  # before 0.32.0

    class GracefulHTTPError(RuntimeError):  # type: ignore[no-redef]
        def __init__(self, message: str, http_status: HTTPStatus) -> None:
            super().__init__(message)


if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.output_processor import OutputProcessor

logger = init_logger(__name__)

DROPS_WEIGHTS = 2  # a level of sleep
# In `additional_config`: whether to refuse requests until all weights were updated.
REQUIRE_UPDATE = "require_weight_update"

Step = Callable[[], tuple[dict[int, EngineCoreOutputs] | None, bool]]


class MixedWeightsError(GracefulHTTPError):
    """A request was refused; the message says why and what to do. HTTP status 503."""

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class WeightsGuard:
    """Asks all ranks for their weights' state between an update and the next step.

    Args:
        engine: Its requests are refused.
        step: What schedules and runs a batch.

    """

    def __init__(self, engine: EngineCore, step: Step) -> None:
        self._engine = engine
        self._step = step
        self._problem: str | None = None
        self._unknown = False  # whether a call to the workers may have loaded weights
        self._failure: str | None = None  # of the last such call
        self._wrote_unseen = False  # it may have done so without the loader
        options = engine.vllm_config.additional_config
        if isinstance(options, dict) and options.get(REQUIRE_UPDATE):
            self._require_update(
                f"The engine was started with {REQUIRE_UPDATE}, and no update of all "
                "weights has come yet."
            )

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple,
        kwargs: dict[str, Any] | None,
    ) -> list[Any]:
        """A user's call to all workers, which may load weights."""
        self._settle()
        self._unknown = True
        try:
            return self._ask(method, timeout, args, kwargs)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            kernel_format = (kwargs or {}).get("is_checkpoint_format") is False
            self._wrote_unseen = method == "reload_weights" and kernel_format
            raise

    def sleep(self, level: int) -> None:
        """Let the executor sleep, which at level 2 drops the weights."""
        self._engine.model_executor.sleep(level)
        if level >= DROPS_WEIGHTS:
            self._require_update("A sleep of level 2 has given the weights up.")

    def step(self) -> tuple[dict[int, EngineCoreOutputs] | None, bool]:
        """Schedule and run a batch, or refuse all requests."""
        if not self._may_run() or not (problem := self._find_problem()):
            return self._step()
        refused = self._refuse(problem)
        # A step of an empty batch, by which the workers forget the requests.
        outputs, executed = self._step()
        outputs = outputs or {}
        for client, ended in refused.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs += ended
        return outputs, executed

    def _require_update(self, why: str) -> None:
        self._ask(_require_update, None, (why,))
        self._unknown = True

    def _ask(self, *call: Any) -> list[Any]:
        return self._engine.model_executor.collective_rpc(*call)

    def _settle(self) -> None:
        """Tell all ranks that a call failed on some rank, if it leaves a mixture.

        There is no mixture if nothing has changed anywhere, so that the old weights
        serve on, or if every rank already had all of its new weights.
        """
        if self._failure is None:
            return
        reason, self._failure = self._failure, None
        changed, complete = zip(*self._ask(_update_progress), strict=True)
        if self._wrote_unseen or (any(changed) and not all(complete)):
            self._ask(_mark_mixed, None, (reason,))

    def _may_run(self) -> bool:
        """Whether a step would run requests; while paused, weights may be changing."""
        scheduler = self._engine.scheduler
        if not scheduler.has_unfinished_requests():
            return False
        if scheduler.pause_state == PauseState.UNPAUSED:
            return True
        running, _ = scheduler.get_request_counts()
        return scheduler.pause_state == PauseState.PAUSED_NEW and running > 0

    def _find_problem(self) -> str | None:
        in_process = hasattr(self._engine.model_executor, "driver_worker")
        if self._unknown or in_process:  # loaded there without a call that is seen here
            self._settle()
            answers = self._ask(_weights_problem)
            problem = next(filter(None, answers), None)
            if problem is not None and problem != self._problem:
                logger.error("Requests are refused. %s", problem)
            self._problem, self._unknown = problem, False
        return self._problem

    def _refuse(self, problem: str) -> dict[int, list[EngineCoreOutput]]:
        """End all requests; by client, what it is told."""
        ended: dict[int, list[EngineCoreOutput]] = {}
        requests = self._engine.scheduler.finish_requests(
            None, RequestStatus.FINISHED_ERROR
        )
        for request in requests:
            output = EngineCoreOutput(
                request.request_id,
                [],
                finish_reason=FinishReason.ERROR,
                stop_reason=problem,
            )
            ended.setdefault(request.client_index, []).append(output)
        return ended


# ---- In the workers


def _weights_problem(worker: Any) -> str | None:
    ask = getattr(worker.get_model(), "weights_problem", None)
    return None if ask is None else ask()


def _update_progress(worker: Any) -> tuple[bool, bool]:
    ask = getattr(worker.get_model(), "update_progress", None)
    return (False, False) if ask is None else ask()


def _mark_mixed(worker: Any, reason: str) -> None:
    mark = getattr(worker.get_model(), "mark_mixed", None)
    if mark is not None:
        mark(reason)


def _require_update(worker: Any, why: str) -> None:
    mark = getattr(worker.get_model(), "require_update", None)
    if mark is not None:
        mark(why)


# ---- In the front-end


def raise_refusals(
    processor: OutputProcessor, outputs: list[EngineCoreOutput]
) -> list[EngineCoreOutput]:
    """`outputs` without the refused requests, whose callers get an exception.

    Raises:
        MixedWeightsError: a request was refused that no task waits for, as in `LLM`.

    """
    refused = {
        output.request_id: output.stop_reason
        for output in outputs
        if output.finish_reason == FinishReason.ERROR
        and isinstance(output.stop_reason, str)
    }
    if not refused:
        return outputs
    unheard = None
    for request_id, reason in refused.items():
        state = processor.request_states.get(request_id)
        if state is None:
            continue
        parent = state.parent_req
        own = request_id if parent is None else parent.request_id
        processor.abort_requests([own], internal=True)
        error = MixedWeightsError(str(reason))
        if state.queue is None:
            unheard = error
        else:
            state.queue.put(error)
    if unheard is not None:
        # One call waits for all requests. It ends here, so nobody takes later outputs.
        processor.abort_requests(list(processor.request_states), internal=True)
        raise unheard
    return [output for output in outputs if output.request_id not in refused]
