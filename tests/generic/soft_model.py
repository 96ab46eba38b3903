# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TinyModel with small weights, so that many tokens are likely."""

import torch
from tiny_model import TinyModel, full_sequence_logits


def soft_model(seed: int) -> TinyModel:
    generator = torch.Generator().manual_seed(seed)
    model = TinyModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def log_probabilities(
    model: TinyModel, token_ids: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """Of each token after the first, float32 `[len(token_ids) - 1]`."""
    logits = full_sequence_logits(model, token_ids)[:-1] / temperature
    chosen = torch.tensor(token_ids[1:])[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0]


def worst_difference(
    model: TinyModel, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> float:
    """Between a batch's log-probabilities and the model's, where it has sampled."""
    worst = 0.0
    for row, end in enumerate(batch["lengths"].tolist()):
        expected = log_probabilities(
            model, batch["all_tokens"][row, :end].tolist(), temperature
        )
        sampled = batch["loss_mask"][row, 1:end] > 0
        difference = (batch["logprobs"][row, : end - 1] - expected)[sampled].abs()
        worst = max([worst, *difference.tolist()])
    return worst
