# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The two ways in which the self-check has a model read its prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.callable_model.wrapper import CallableModelWrapper
from vllm.sequence import IntermediateTensors

from .engine_batch import EngineBatches, positions_of
from .schedule import Piece

# A context manager around each call of the module, such as one that traces it.
Around = Callable[[nn.Module], AbstractContextManager[Any]]

# Of a request, `[compared positions, vocab]` in float32; None on ranks without logits.
Logprobs = torch.Tensor | None

# What a stage sends when its forward raised, instead of tensors.
FAILED = "failed"


class Forwards:
    """The model in the engine, and its own full forward.

    All ranks of the engine call the same methods together.

    Args:
        prompts: Token ids `[tokens]` of each request.
        steps: The pieces that the engine reads in each step.

    """

    def __init__(
        self,
        model: CallableModelWrapper,
        vllm_config: VllmConfig,
        prompts: list[torch.Tensor],
        steps: list[list[Piece]],
        device: torch.device,
    ) -> None:
        self.model = model
        self._vllm_config = vllm_config
        self._device = device
        self.prompts = prompts
        self.steps = steps
        # By request, the positions whose logits are compared.
        self._compared = [
            sorted(
                position
                for step in steps
                for piece in step
                if piece.request == request
                for position in piece.compared()
            )
            for request in range(len(prompts))
        ]

    def served(
        self, batches: EngineBatches, around: Around | None = None
    ) -> list[Logprobs]:
        """Log-probs of each request as the engine computes them, step by step.

        Returns:
            Of each request `[compared positions, vocab]` in float32; None on ranks
            that have no logits.

        """
        found: list[dict[int, torch.Tensor]] = [{} for _ in self.prompts]
        for pieces in self.steps:
            ids = torch.cat([self.prompts[p.request][p.start : p.end] for p in pieces])
            # vLLM's ids are int32 and its positions int64
            ids = ids.to(self._device, torch.int32)
            positions = positions_of(pieces).to(self._device)
            with batches.step(pieces), self._around(around):
                call = partial(self.model.forward, ids, positions)
                output = self._through_stages(call)
                if not isinstance(output, torch.Tensor):
                    continue
                start = 0
                for piece in pieces:
                    rows = [start + p - piece.start for p in piece.compared()]
                    logprobs = self._logprobs(output[rows])
                    if logprobs is not None:
                        found[piece.request] |= zip(
                            piece.compared(), logprobs, strict=True
                        )
                    start += piece.tokens
        return [
            torch.stack([rows[position] for position in sorted(rows)]) if rows else None
            for rows in found
        ]

    def own(self, around: Around | None = None) -> list[Logprobs]:
        """As `served`, by the module's own forward of whole prompts, outside a step."""
        logprobs: list[Logprobs] = []
        for prompt, compared in zip(self.prompts, self._compared, strict=True):
            ids = prompt.to(self._device)
            # vLLM's fused experts need this context. It makes no engine step.
            with (
                set_forward_context(
                    None, self._vllm_config, num_tokens=len(ids), skip_compiled=True
                ),
                self._around(around),
            ):
                logprobs.append(self._own_logprobs(ids, compared))
        return logprobs

    def _own_logprobs(self, ids: torch.Tensor, compared: list[int]) -> Logprobs:
        adapted = self.model.adapted
        if adapted is not None and get_pp_group().world_size > 1:
            logits = self._through_stages(partial(adapted.stage_forward, ids))
            if not isinstance(logits, torch.Tensor):
                return None
            vocab_size = self._vllm_config.model_config.get_vocab_size()
            return _log_softmax(logits[compared, :vocab_size])
        if self.model.full_forward is not None:
            vocab_size = self._vllm_config.model_config.get_vocab_size()
            return _log_softmax(self.model.full_forward(ids)[compared, :vocab_size])
        positions = torch.arange(len(ids), device=self._device)
        call = partial(self.model.call_module, ids, positions)
        output = self._through_stages(call)
        if isinstance(output, torch.Tensor):
            return self._logprobs(output[compared])
        return None

    def _around(self, around: Around | None) -> AbstractContextManager[Any]:
        return nullcontext() if around is None else around(self.model.module)

    def _through_stages(self, call: Callable[[IntermediateTensors | None], Any]) -> Any:
        """What this pipeline stage computes of what the stage before sends.

        If one raises, all later ones do, and none waits for it.
        """
        group = get_pp_group()
        sent: dict[str, Any] = {FAILED: True}
        try:
            received = None
            if not group.is_first_rank:
                tensors = group.recv_tensor_dict()
                assert tensors is not None
                if FAILED in tensors:
                    raise RuntimeError("an earlier pipeline stage failed")
                received = IntermediateTensors(tensors)
            output = call(received)
            if isinstance(output, IntermediateTensors):
                sent = output.tensors
        finally:
            if not group.is_last_rank:
                group.send_tensor_dict(sent)
        return output

    def _logprobs(self, hidden_states: torch.Tensor) -> Logprobs:
        logits = self.model.compute_logits(hidden_states)
        return None if logits is None else _log_softmax(logits)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)
