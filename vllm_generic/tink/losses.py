# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The published losses: sums over tokens and datums, never means.

Position i of the input predicts target i. In formulas: lp is the log-probability of the
target, q the sampler's (the input ``logprobs``), A the advantage, r = exp(lp - q).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from vllm_generic.tink.backends.base import Batch, Datum
from vllm_generic.tink.errors import UserError

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]


def cross_entropy(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-lp w; both [N] or [N, K]."""
    return -(lp * inputs["weights"]).sum()


def importance_sampling(
    lp: torch.Tensor, inputs: Inputs, config: Config
) -> torch.Tensor:
    """-r A"""
    ratio = torch.exp(lp - inputs["logprobs"])
    return -(ratio * inputs["advantages"]).sum()


def _thresholds(
    inputs: Inputs, config: Config, low: float, high: float
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Thresholds of each token if the datum has them, else those of the config."""
    return (
        inputs.get("clip_low_threshold", config.get("clip_low_threshold", low)),
        inputs.get("clip_high_threshold", config.get("clip_high_threshold", high)),
    )


def _clip(
    ratio: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float
) -> torch.Tensor:
    low = torch.as_tensor(low, dtype=ratio.dtype)
    high = torch.as_tensor(high, dtype=ratio.dtype)
    return torch.minimum(torch.maximum(ratio, low), high)


def ppo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-min(r A, clip(r) A)"""
    ratio = torch.exp(lp - inputs["logprobs"])
    clipped = _clip(ratio, *_thresholds(inputs, config, 0.8, 1.2))
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def cispo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-stopgrad(clip(r)) lp A"""
    ratio = torch.exp(lp.detach() - inputs["logprobs"])
    clipped = _clip(ratio, *_thresholds(inputs, config, 0.0, 4.0))
    return -(clipped * lp * inputs["advantages"]).sum()


def dro(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-(lp A - beta / 2 (lp - q)^2)"""
    penalty = config.get("beta", 0.05) / 2 * (lp - inputs["logprobs"]) ** 2
    return -(lp * inputs["advantages"] - penalty).sum()


def gspo(lp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """PPO with the sequence's ratio, whose gradient goes to each token.

    The log-ratio of the sequence is the mean of lp - q where sequence_ratio_mask is not
    0. It is a constant to the gradient, which flows through lp - stopgrad(lp).
    """
    mask = inputs["sequence_ratio_mask"] != 0
    if not mask.any():
        raise UserError("sequence_ratio_mask is 0 everywhere; gspo needs a token in it")
    sequence = (lp - inputs["logprobs"])[mask].mean().detach()
    ratio = torch.exp(sequence + lp - lp.detach())
    clipped = _clip(ratio, *_thresholds(inputs, config, 1 - 3e-4, 1 + 4e-4))
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


Loss = Callable[[torch.Tensor, Inputs, Config], torch.Tensor]

_POLICY = {"logprobs", "advantages"}
_CLIP = {"clip_low_threshold", "clip_high_threshold"}
# name -> function, inputs that are needed, inputs that may be given, configuration
LOSSES: dict[str, tuple[Loss, set[str], set[str], set[str]]] = {
    "cross_entropy": (cross_entropy, {"weights"}, set(), set()),
    "importance_sampling": (importance_sampling, _POLICY, set(), set()),
    "ppo": (ppo, _POLICY, _CLIP, _CLIP),
    "cispo": (cispo, _POLICY, _CLIP, _CLIP),
    "dro": (dro, _POLICY, set(), {"beta"}),
    "gspo": (gspo, _POLICY | {"sequence_ratio_mask"}, _CLIP, _CLIP),
}


def find_loss(name: str) -> Loss:
    return LOSSES[name][0]


def loss_inputs(datum: Datum, dtype: torch.dtype = torch.float32) -> Inputs:
    """The loss inputs of a checked datum as tensors, without its target_tokens."""
    return {
        name: torch.tensor(array, dtype=dtype)
        for name, array in datum.loss_inputs.items()
        if name != "target_tokens"
    }


def check_batch(batch: Batch, max_length: int, vocab_size: int) -> None:
    """Raise UserError for a batch that a backend cannot compute."""
    if batch.loss_fn == "stable_reinforce":
        raise UserError(
            "loss_fn 'stable_reinforce' is not available: its definition is not "
            "public. Use importance_sampling, ppo, cispo, dro or gspo."
        )
    if batch.loss_fn not in LOSSES:
        raise UserError(
            f"loss_fn {batch.loss_fn!r} is unknown; expected one of {', '.join(LOSSES)}"
        )
    _, needed, optional, settings = LOSSES[batch.loss_fn]
    unknown = set(batch.loss_config) - settings
    if unknown:
        raise UserError(
            f"loss_fn_config has {sorted(unknown)}, which {batch.loss_fn} does not "
            f"take; it takes {sorted(settings) or 'nothing'}"
        )
    if not batch.data:
        raise UserError("the batch has no datum")
    needed = needed | {"target_tokens"}
    for index, datum in enumerate(batch.data):
        try:
            _check_datum(datum, batch.loss_fn, needed, optional, max_length, vocab_size)
        except UserError as error:
            raise UserError(f"datum {index}: {error}") from None


def _check_datum(
    datum: Datum,
    loss_fn: str,
    needed: set[str],
    optional: set[str],
    max_length: int,
    vocab_size: int,
) -> None:
    given = set(datum.loss_inputs)
    if needed - given or given - needed - optional:
        raise UserError(
            f"{loss_fn} needs the inputs {sorted(needed)}; "
            f"the datum has {sorted(given)}"
        )
    length = len(datum.tokens)
    if not 0 < length <= max_length:
        raise UserError(f"its input has {length} tokens; expected 1 to {max_length}")
    targets = datum.loss_inputs["target_tokens"]
    if targets.dtype.kind != "i":
        raise UserError(f"target_tokens has dtype {targets.dtype}; expected integers")
    axes = (1, 2) if loss_fn == "cross_entropy" else (1,)
    if targets.ndim not in axes:
        raise UserError(
            f"target_tokens has the shape {list(targets.shape)}; "
            f"{loss_fn} takes {' or '.join(['[N]', '[N, K]'][: len(axes)])}"
        )
    for name, array in datum.loss_inputs.items():
        if array.shape != targets.shape or len(array) != length:
            raise UserError(
                f"{name} has the shape {list(array.shape)}; the input has {length} "
                f"tokens and target_tokens the shape {list(targets.shape)}"
            )
    for name, ids in (("input", datum.tokens), ("target_tokens", targets)):
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
            raise UserError(
                f"{name} has the token {int(wrong)}; expected 0 to {vocab_size - 1}"
            )


def target_logprobs(logits: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
    """Log-probabilities of targets [N] or [N, K] under logits [N, vocabulary]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    index = torch.from_numpy(targets.astype(np.int64))
    # [N, K], or [N, 1] for one target each
    picked = logprobs.gather(-1, index.reshape(len(index), -1))
    return picked.reshape(index.shape)
