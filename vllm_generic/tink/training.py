# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a training request does. All of this runs in the trainer's thread."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_trainer import AdamWParams
from vllm_generic.tink.backends.base import Batch, BatchOutput, Trainer
from vllm_generic.tink.checkpoints import Checkpoints
from vllm_generic.tink.codec import decode_batch, parse_batch
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.losses import check_batch
from vllm_generic.tink.runs import Operation, Run

CREATE, FORWARD_BACKWARD, OPTIM_STEP = "create_model", "forward_backward", "optim_step"
SAVE, LOAD = "save_weights", "load_weights"
SAVE_SAMPLER, SAVE_EXTERNAL = "save_weights_for_sampler", "save_weights_external"
SAVES = (SAVE, SAVE_SAMPLER, SAVE_EXTERNAL)


@dataclass(frozen=True)
class Step:
    """A request, with what the event loop has looked up for it."""

    run: Run
    operation: Operation
    journal: list[Operation]
    source: Path | None = None  # the folder that is loaded
    target: Path | None = None  # the folder that is saved


def adam_params(request: dict[str, Any]) -> AdamWParams:
    other = request.get("optimizer_params")
    if other is not None:
        raise UserError(
            f"the optimizer {other.get('type')!r} is not available; use AdamParams"
        )
    return AdamWParams(**request.get("adam_params", {}))


class Training:
    def __init__(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        self.trainer = trainer
        self._checkpoints = checkpoints

    def batch(self, operation: Operation) -> Batch:
        batch = decode_batch(parse_batch(operation.body))
        check_batch(batch, self.trainer.max_length, self.trainer.vocab_size)
        return batch

    def forward_backward(
        self, steps: list[Step], batches: list[Batch]
    ) -> dict[str, BatchOutput]:
        """One pass over the batches of several runs."""
        for step in steps:
            self._restore(step)
        jobs = {s.run.id: b for s, b in zip(steps, batches, strict=True)}
        return self.trainer.forward_backward(jobs)

    def optim_step(self, step: Step) -> dict[str, float]:
        params = adam_params(step.operation.json())
        self._restore(step)
        return self.trainer.optim_step(step.run.id, params)

    def create(self, step: Step) -> None:
        self._restore(step)

    def load(self, step: Step) -> None:
        """Load a checkpoint, and keep the result: the checkpoint may be deleted."""
        assert step.source is not None
        self._restore(step)
        optimizer = bool(step.operation.json()["optimizer"])
        self.trainer.load(step.run.id, step.source, optimizer)
        self.snapshot(step.run, step.operation.seq)

    def save(self, step: Step) -> tuple[int, Adapter]:
        """Write the adapter into the target, with the optimizer's state if it is for
        training. Answers the size in bytes, and the adapter."""
        assert step.target is not None
        self._restore(step)
        return self._write(step.target, step.run, step.operation.kind == SAVE)

    def snapshot(self, run: Run, seq: int) -> None:
        """Write the state after ``seq``, which left no gradients."""
        self._write(self._checkpoints.snapshot(run.id, seq), run, optimizer=True)

    def _write(self, target: Path, run: Run, optimizer: bool) -> tuple[int, Adapter]:
        adapter = self.trainer.export(run.id)

        def save(folder: Path) -> None:
            adapter.save(folder)
            if optimizer:
                self.trainer.save_optimizer(run.id, folder)

        return self._checkpoints.write(target, save), adapter

    def unload(self, run: Run) -> None:
        """Forget a run; its next request restores it."""
        if run.loaded:
            run.loaded = False
            self.trainer.remove(run.id)

    def _restore(self, step: Step) -> None:
        """Bring the run to the state before the step, from its snapshot and journal."""
        run = step.run
        if run.loaded:
            return
        self.trainer.create(run.id, run.spec)
        run.loaded = True
        if run.snapshot_seq >= 0:
            folder = self._checkpoints.snapshot(run.id, run.snapshot_seq)
            self.trainer.load(run.id, folder, optimizer=True)
        for operation in step.journal:
            if operation.kind == FORWARD_BACKWARD:
                batch = self.batch(operation)
                if not batch.forward_only:
                    self.trainer.forward_backward({run.id: batch})
            elif operation.kind == OPTIM_STEP:
                params = adam_params(operation.json())
                self.trainer.optim_step(run.id, params)
