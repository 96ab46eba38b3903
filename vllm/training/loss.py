# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Logits, log-probabilities and cross-entropy with the vocabulary split over ranks.

No rank ever holds `[tokens, vocab]`: the ranks exchange two numbers for each token in
forward, and nothing in backward. Sums are in float32, or in float64 for logits in
float64, without a float32 copy of all logits: on a GPU and in compiled models kernels
are fused, and on a CPU they take blocks of rows.

Reference: Megatron-LM, https://arxiv.org/abs/1909.08053, section 3
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from vllm.distributed import differentiable_collectives as collectives
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logits",
    "vocab_parallel_token_log_probs",
]


def vocab_parallel_logits(
    lm_head: VocabParallelEmbedding, hidden_states: torch.Tensor
) -> torch.Tensor:
    """This rank's logits: what vLLM's `LogitsProcessor` gathers.

    Args:
        lm_head: A `ParallelLMHead`, or the embedding whose weight is also the head's.
        hidden_states: `[..., hidden]`, the same on all ranks.

    Returns:
        `[..., padded vocab / TP]`, differentiable. Columns after the rank's last
        token are padding.

    """
    bias = getattr(lm_head, "bias", None)
    return lm_head.quant_method.apply(lm_head, hidden_states, bias)


def vocab_parallel_token_log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, lm_head: VocabParallelEmbedding
) -> torch.Tensor:
    """Log-probabilities of tokens, the same on all ranks.

    Args:
        logits: `[..., padded vocab / TP]` from `vocab_parallel_logits`.
        token_ids: Int64 `[...]`, of the whole vocabulary, the same on all ranks.
        lm_head: Says which tokens are this rank's.

    Returns:
        float32 `[...]`, or float64 for float64 logits; differentiable. A token outside
        the vocabulary has -inf.

    Raises:
        ValueError: Shapes do not fit each other or `lm_head`.

    """
    width = lm_head.num_embeddings_per_partition
    if logits.shape != (*token_ids.shape, width) or lm_head.num_added_embeddings:
        raise ValueError(
            f"logits have shape {list(logits.shape)} for token_ids of shape "
            f"{list(token_ids.shape)}; expected {[*token_ids.shape, width]}, as from "
            "vocab_parallel_logits, and a vocabulary without added embeddings, got "
            f"{lm_head.num_added_embeddings}."
        )
    shard = lm_head.shard_indices
    log_probs = _TokenLogProbs.apply(
        logits.reshape(-1, width),
        token_ids.reshape(-1) - shard.org_vocab_start_index,
        shard.num_org_elements,
        lm_head.tp_size,
    )
    return log_probs.view(token_ids.shape)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lm_head: VocabParallelEmbedding,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> torch.Tensor:
    """Cross-entropy in nats, the same on all ranks, as of `F.cross_entropy`.

    Args:
        logits: `[..., padded vocab / TP]` from `vocab_parallel_logits`.
        labels: Int64 `[...]`, of the whole vocabulary, the same on all ranks.
        lm_head: Says which tokens are this rank's.
        ignore_index: A label that does not count.
        reduction: The mean or the sum over labels that count, or none: `[...]`.

    Raises:
        ValueError: Shapes do not fit each other or `lm_head`.

    """
    counts = labels != ignore_index
    log_probs = vocab_parallel_token_log_probs(logits, labels.where(counts, 0), lm_head)
    losses = -log_probs.where(counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


class _TokenLogProbs(torch.autograd.Function):
    """`logits` `[tokens, width]`, of which columns from `size` on are padding.

    `index` `[tokens]` is the token's column where it is this rank's, else outside.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, index: torch.Tensor, size: int, tp_size: int
    ) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        here = (index >= 0) & (index < size)
        column = index.masked_fill(~here, 0)[:, None]
        chosen = logits.gather(1, column).squeeze(1).to(dtype)
        chosen = chosen.masked_fill(~here, -torch.inf)
        normalizer = torch.full_like(chosen, -torch.inf)
        if size:  # a rank may have padding only
            normalizer = _of_rows(_logsumexp, dtype, size, logits)
        if tp_size > 1:
            # [1, 2, tokens] -> [TP, 2, tokens]
            local = torch.stack([chosen, normalizer]).unsqueeze(0)
            chosen, normalizer = collectives.all_gather(
                local, get_tp_group(), dim=0
            ).unbind(1)
            chosen, normalizer = chosen.amax(0), normalizer.logsumexp(0)
        ctx.save_for_backward(logits, index, normalizer)
        ctx.size = size
        return chosen - normalizer

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, index, normalizer = ctx.saved_tensors
        gradient = _of_rows(
            _gradient, logits.dtype, ctx.size, logits, index, normalizer, grad
        )
        return gradient, None, None, None


def _logsumexp(dtype: torch.dtype, size: int, logits: torch.Tensor) -> torch.Tensor:
    # [tokens, width] -> [tokens]
    return logits[:, :size].to(dtype).logsumexp(1)


def _gradient(
    dtype: torch.dtype,
    size: int,
    logits: torch.Tensor,
    index: torch.Tensor,
    normalizer: torch.Tensor,
    grad: torch.Tensor,
) -> torch.Tensor:
    # d log p[t] / d logit[v] = (v == t) - softmax[v], [tokens, width]
    column = torch.arange(logits.shape[1], device=logits.device)
    softmax = (logits - normalizer[:, None]).exp()
    exact = ((column == index[:, None]).to(grad.dtype) - softmax) * grad[:, None]
    return exact.masked_fill(column >= size, 0).to(dtype)


# Fused, they read the logits once; only the gradient is written at the logits' size.
_KERNELS = {function: torch.compile(function) for function in (_logsumexp, _gradient)}


def _of_rows(
    function: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    size: int,
    *tensors: torch.Tensor,
) -> torch.Tensor:
    """`function` of tensors `[tokens, ...]`, fused on a GPU.

    On a CPU, where that would need a compiler, it is called for blocks of rows, so that
    float32 copies of the logits stay within 64 MiB.
    """
    if torch.compiler.is_compiling():
        return function(dtype, size, *tensors)
    if tensors[0].is_cuda:
        return _KERNELS[function](dtype, size, *tensors)
    rows = max(1, (1 << 24) // tensors[0].shape[1])
    blocks = zip(*(x.split(rows) for x in tensors), strict=True)
    return torch.cat([function(dtype, size, *block) for block in blocks])
