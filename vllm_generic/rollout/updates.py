# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Updates a policy's weights, and numbers the updates across changes of engines."""

from __future__ import annotations

from torch import nn

from vllm import RequestOutput
from vllm.distributed.weight_sync import WeightSync
from vllm.model_executor.parallel_context import ParallelContext
from vllm_generic.rollout.batch import number_versions
from vllm_generic.rollout.engines import Engine
from vllm_generic.rollout.ranks import on_first_rank


class Updates:
    """Makes a `WeightSync` for the engines that are there, and numbers its updates.

    A `WeightSync` goes on from the versions of its engines, which begin at 0. These
    numbers go on whatever engines there are.

    Args:
        version: The number of the weights that the engines have loaded.
        timeout: Seconds for any wait.

    """

    def __init__(self, version: int, timeout: float) -> None:
        self.version = version
        self._offset = version  # of these numbers from the engines' versions
        self._is_attached_anew = False
        self._timeout = timeout
        self._sync: WeightSync | None = None
        self._model: nn.Module | None = None

    def update(
        self,
        model: nn.Module,
        parallel_context: ParallelContext | None,
        engine: Engine | None,
    ) -> int:
        """Bring the weights of a module into the engine, which the first rank has.

        Raises:
            RuntimeError: it failed; the old weights serve on.

        """
        changed = on_first_rank(lambda: engine is not None and engine.has_changed())
        if self._sync is None or self._model is not model or changed:
            self._attach(model, parallel_context, engine)
        assert self._sync is not None
        try:
            update = self._sync.update()
        except RuntimeError:
            if not on_first_rank(lambda: engine is not None and engine.lost_some()):
                raise
            # Some engines are lost. The others have kept the old weights.
            self._attach(model, parallel_context, engine)
            update = self._sync.update()
        if self._is_attached_anew:
            self._offset = self.version + 1 - update
            self._is_attached_anew = False
        self.version = self._offset + update
        return self.version

    def number(self, output: RequestOutput) -> RequestOutput:
        """Replace the labels of an output's weights by numbers of this object's."""
        if self._sync is None:  # another user of the engine set these labels
            number_versions(output, lambda label: self.version)
        else:
            number_versions(output, self._number)
        return output

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
        self._sync = self._model = None

    def _attach(
        self,
        model: nn.Module,
        parallel_context: ParallelContext | None,
        engine: Engine | None,
    ) -> None:
        self.close()

        def make(handles: object) -> WeightSync:
            return WeightSync(
                model,
                handles,  # type: ignore[arg-type]
                parallel_context=parallel_context,
                timeout=self._timeout,
            )

        self._sync = make(None) if engine is None else engine.make_sync(make)
        self._model = model
        self._is_attached_anew = True

    def _number(self, label: str) -> int:
        return self._offset + (int(label) if label.isdecimal() else 0)
