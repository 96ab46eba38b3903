# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The layer: a router and its experts, whole, split, or spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm.distributed import differentiable_collectives as collectives
from vllm.distributed.parallel_state import get_ep_group, get_tp_group
from vllm.model_executor.layers.trainable_experts.routing import RoutedLayer
from vllm.model_executor.layers.tree_linear import linear, number_of_leaves
from vllm.model_executor.layers.tree_linear.linear import partial_linear, total_of_ranks
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.layout import MARK

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

__all__ = ["TrainableExperts"]


class TrainableExperts(RoutedLayer):
    """A router, and experts of which each token goes through the best `top_k`.

    An expert is `down_proj(silu(gate_proj(x)) * up_proj(x))`, without biases, and its
    weight is the softmax of the router's output. One module, one checkpoint and, in the
    batch-invariant mode, the same bits, whether the experts are whole (one rank), split
    (tensor parallelism), or spread over the ranks (`enable_expert_parallel`). An
    expert's output is summed in the tree of every divided layer and rounded as that of
    a linear layer; a token's experts are then added in the order of their scores.

    The parameters are `router.weight` and `experts.<i>.gate_proj.weight`, `up_proj` and
    `down_proj`, under their numbers in the whole model; a rank has its own experts, or
    its part of each.

    Args:
        hidden_size: Features of the tokens.
        intermediate_size: Features inside an expert.
        num_experts: In the whole model.
        top_k: How many experts each token has.
        context: What this rank builds.
        layer_id: The index of the transformer layer in the whole model; places the
            routing that is recorded and replayed.
        renormalize: Whether the weights of a token's experts sum to 1.

    Raises:
        ValueError: The ranks do not divide the experts or their features, or expert
            parallelism spans data-parallel ranks.

    References: https://arxiv.org/abs/1701.06538; the form is that of Qwen3-MoE.

    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        context: ParallelContext | None = None,
        layer_id: int = 0,
        renormalize: bool = True,
    ) -> None:
        super().__init__(layer_id, top_k)
        context = context or ParallelContext()
        self.num_experts, self.renormalize = num_experts, renormalize
        self.intermediate_size = intermediate_size
        self.spread = context.expert_parallel_size
        self.split = 1 if self.spread > 1 else context.tensor_parallel_size
        if self.spread > context.tensor_parallel_size:
            raise ValueError(
                f"{self.spread} expert-parallel ranks span data-parallel ranks, which "
                "have tokens of their own; expected at most the "
                f"{context.tensor_parallel_size} tensor-parallel ranks. Start the "
                "engine without data parallelism."
            )
        for what, size, ranks in (
            ("experts", num_experts, self.spread),
            ("features of an expert", intermediate_size, self.split),
        ):
            if size % ranks:
                raise ValueError(
                    f"{size} {what} cannot be divided by {ranks} ranks. Use a number "
                    "of ranks that divides them."
                )
        mine = num_experts // self.spread
        first = context.expert_parallel_rank * mine
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleDict(
            {
                str(index): _expert(hidden_size, intermediate_size, self.split)
                for index in range(first, first + mine)
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` -> `[..., hidden]`, the same on all ranks."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = linear(tokens, self.router.weight).softmax(-1, dtype=torch.float32)
        chosen = self.route(scores)  # [tokens, top_k]
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / weights.sum(1, keepdim=True)
        outputs = self._outputs(tokens, chosen).float()  # [tokens, top_k, hidden]
        # One by one, because the order of torch.sum depends on the shape.
        total = outputs[:, 0] * weights[:, :1]
        for k in range(1, self.top_k):
            total = total + outputs[:, k] * weights[:, k : k + 1]
        return total.to(x.dtype).view(x.shape)

    def _outputs(self, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What each token's experts give, `[tokens, top_k, hidden]`."""
        group: GroupCoordinator | None = None
        if self.split > 1 or self.spread > 1:
            group = get_ep_group() if self.spread > 1 else get_tp_group()
            # Each rank has a part of the gradient of what all ranks have.
            tokens = collectives.copy(tokens, group)
        leaves = number_of_leaves(self.intermediate_size, self.split)
        parts, places = [], []
        expert: Any  # nn.Module has no item access
        # Experts without a token are called, too: FSDP waits for all gradients.
        for index, expert in self.experts.items():
            token, slot = (chosen == int(index)).nonzero(as_tuple=True)
            inside = self._inside(expert, tokens[token])
            weight = expert["down_proj"].weight
            parts.append(partial_linear(inside, weight, leaves, self.split))
            places.append(token * self.top_k + slot)
        found = torch.cat(parts)  # [tokens * top_k of these experts, hidden]
        if self.split > 1:
            assert group is not None
            found = total_of_ranks(found, None, leaves, tokens.dtype, group)
        # -0.0 is what changes no other rank's value in the sum.
        flat = found.new_full((chosen.numel(), found.shape[1]), -0.0)
        flat = flat.index_copy(0, torch.cat(places), found)
        if self.spread > 1:
            assert group is not None
            flat = collectives.all_reduce(flat, group)
        return flat.view(*chosen.shape, -1)

    def _inside(self, expert: Any, x: torch.Tensor) -> torch.Tensor:
        # [tokens, hidden] -> [tokens, intermediate of this rank]
        gate = linear(x, expert["gate_proj"].weight)
        return F.silu(gate) * linear(x, expert["up_proj"].weight)


def _expert(hidden: int, intermediate: int, split: int) -> nn.ModuleDict:
    """This rank's part of one expert, with megatron-core's marks for the loader."""
    inside = intermediate // split
    expert = nn.ModuleDict(
        {
            "gate_proj": nn.Linear(hidden, inside, bias=False),
            "up_proj": nn.Linear(hidden, inside, bias=False),
            "down_proj": nn.Linear(inside, hidden, bias=False),
        }
    )
    if split > 1:
        for name, part in expert.items():
            weight: Any = part.weight
            setattr(weight, MARK, True)
            weight.partition_dim = int(name == "down_proj")
            weight.partition_stride = 1
    return expert
