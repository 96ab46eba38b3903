# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ways to parallelize a language model, each for every layout and of one checkpoint.

They share `Stage`: with vLLM's parallel layers, with Megatron's, with DTensor, by a
plan, and as a mixture of experts, whose layer is PyTorch's or vLLM's.
"""

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.trainable_experts import TrainableExperts
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.model_executor.parallel_context import ParallelContext

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


class Attention(nn.Module):
    def __init__(self, config: Any, context: ParallelContext, kind: Any) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", hidden // heads)
        kv_heads = getattr(config, "num_key_value_heads", heads)
        bias = getattr(config, "attention_bias", True)
        ranks, rank = context.tensor_parallel_size, context.tensor_parallel_rank
        shared = ranks > kv_heads  # several ranks have one head: they compute all
        key_or_value = kind.whole if shared else kind.column
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = kind.column(hidden, width, bias=bias)
        self.k_proj = key_or_value(hidden, kv_width, bias=bias)
        self.v_proj = key_or_value(hidden, kv_width, bias=bias)
        first = rank * kv_heads // ranks
        self.kv_heads = slice(first, first + 1) if shared else slice(None)
        if getattr(config, "qk_norm", False):
            self.q_norm = nn.RMSNorm(self.head_dim)
            self.k_norm = nn.RMSNorm(self.head_dim)
        self.attention = TrainableAttention(
            heads // ranks, self.head_dim, max(1, kv_heads // ranks)
        )
        self.o_proj = kind.row(width, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [tokens, hidden] -> [tokens, heads of this rank, head_dim]
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        k, v = k[:, self.kv_heads], v[:, self.kv_heads]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(self.attention(q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Any, kind: Any) -> None:
        super().__init__()
        self.up = kind.column(config.hidden_size, config.intermediate_size)
        self.down = kind.row(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Expert(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Whole experts on each expert-parallel rank; the names are the same on all."""

    def __init__(self, config: Any, context: ParallelContext, index: int) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.context = context
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        size, rank = context.expert_parallel_size, context.expert_parallel_rank
        self.experts = nn.ModuleDict(
            {
                str(index): Expert(config)
                for index in range(rank, config.num_experts, size)
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = len(x)
        x, start = self.gather_tokens(x)
        weights, chosen = self.router(x).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(x)
        for index, expert in self.experts.items():
            token, slot = (chosen == int(index)).nonzero(as_tuple=True)
            out.index_add_(0, token, weights[token, slot, None] * expert(x[token]))
        if self.context.expert_parallel_size > 1:
            dist.all_reduce(out, group=self.context.get_ep_process_group())
        return out[start : start + tokens]

    def gather_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The tokens of all data-parallel ranks, and where those of this one begin."""
        size, rank = self.context.data_parallel_size, self.context.data_parallel_rank
        if size == 1:
            return x, 0
        group = self.context.get_dp_process_group()
        count = torch.tensor([len(x)], device=x.device)
        counts = [torch.empty_like(count) for _ in range(size)]
        dist.all_gather(counts, count, group=group)
        padded = F.pad(x, (0, 0, 0, int(max(counts)) - len(x)))
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(parts), int(sum(counts[:rank]))


def build_experts(config: Any, context: ParallelContext, index: int) -> nn.Module:
    """The layer above, or vLLM's that has the same bits in every layout."""
    if not getattr(config, "trainable_experts", False):
        return Experts(config, context, index)
    return TrainableExperts(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        context,
        layer_id=index,
    )


class FusedExperts(nn.Module):
    """The same by vLLM's fused layer, which divides the experts itself."""

    def __init__(self, config: Any, context: ParallelContext, index: int) -> None:
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory  # 0.32.0 on

        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = FusedMoEFactory(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            renormalize=False,
            prefix=f"layers.{index}.mlp.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.router(x))


class Block(nn.Module):
    def __init__(
        self, config: Any, context: ParallelContext, kind: Any, index: int
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config, context, kind)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        if hasattr(config, "num_experts"):
            self.mlp: nn.Module = kind.experts(config, context, index)
        else:
            self.mlp = MLP(config, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Stage(nn.Module):
    """What one pipeline stage has of the model; without stages it is the whole."""

    def __init__(self, config: Any, context: ParallelContext, kind: Any) -> None:
        super().__init__()
        vocab, hidden = config.vocab_size, config.hidden_size
        if context.is_first_stage:
            self.embedding = kind.embedding(vocab, hidden)
            self.positions = nn.Embedding(config.max_position_embeddings, hidden)
        self.layers = nn.ModuleDict(
            {
                str(index): Block(config, context, kind, index)
                for index in context.layer_range(config.num_hidden_layers)
            }
        )
        if context.is_last_stage:
            self.norm = nn.LayerNorm(hidden)
            self.lm_head = kind.head(vocab, hidden)
        if getattr(config, "tie_word_embeddings", False):
            tie(self)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = inputs_embeds
        if x is None:
            x = self.embedding(input_ids) + self.positions(positions)
        for layer in self.layers.values():
            x = layer(x)
        return self.norm(x) if hasattr(self, "norm") else x


def tie(model: Stage) -> None:
    """Have the output head use the embedding's weight."""
    model.lm_head.weight = model.embedding.weight


# What a layer is made of: plain PyTorch, or vLLM's layers.
PLAIN = SimpleNamespace(
    embedding=nn.Embedding,
    whole=nn.Linear,
    column=nn.Linear,
    row=nn.Linear,
    head=lambda vocab, hidden: nn.Linear(hidden, vocab, bias=False),
    experts=build_experts,
)
PARALLEL = SimpleNamespace(
    embedding=VocabParallelEmbedding,
    whole=partial(ReplicatedLinear, return_bias=False),
    column=partial(ColumnParallelLinear, return_bias=False),
    row=partial(RowParallelLinear, return_bias=False),
    head=ParallelLMHead,
    experts=build_experts,
)
FUSED = SimpleNamespace(**vars(PARALLEL) | {"experts": FusedExperts})


def build_plain(config: Any) -> Stage:
    """The whole model, without vLLM: what is trained, and the reference."""
    return Stage(config, ParallelContext(), PLAIN)


def build_parallel(vllm_config: Any, parallel_context: ParallelContext) -> Stage:
    """With vLLM's layers; of a mixture of experts if the config says so."""
    config = vllm_config.model_config.hf_config
    return Stage(config, parallel_context, PARALLEL)


class FusedStage(Stage):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


def build_fused(vllm_config: Any, parallel_context: ParallelContext) -> FusedStage:
    """A mixture of experts with vLLM's fused layer."""
    return FusedStage(vllm_config.model_config.hf_config, parallel_context, FUSED)


def build_dtensor(vllm_config: Any, parallel_context: ParallelContext) -> Stage:
    """PyTorch's layers, parallelized from outside."""
    config = vllm_config.model_config.hf_config
    model = Stage(config, parallel_context, PLAIN)
    ranks = parallel_context.tensor_parallel_size
    shared = ranks > getattr(config, "num_key_value_heads", ranks)
    projections = "q" if shared else "[qkv]"
    plan = {
        f"layers.*.attention.{projections}_proj": ColwiseParallel(),
        "layers.*.attention.o_proj": RowwiseParallel(),
        "layers.*.mlp.up": ColwiseParallel(),
        "layers.*.mlp.down": RowwiseParallel(),
    }
    if parallel_context.is_last_stage:
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    tied = getattr(config, "tie_word_embeddings", False)
    if tied:
        plan["embedding"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Replicate()
        )
    parallelize_module(model, parallel_context.device_mesh()["tp"], plan)
    if tied:
        tie(model)
    return model


def build_megatron(vllm_config: Any, parallel_context: ParallelContext) -> Stage:
    """With megatron-core's layers."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer import TransformerConfig

    config = vllm_config.model_config.hf_config
    groups = parallel_context.megatron_groups()
    options = {
        "config": TransformerConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            tensor_model_parallel_size=groups.tp.size(),
            use_cpu_initialization=True,
        ),
        "init_method": nn.init.zeros_,  # the checkpoint has the values
        "tp_group": groups.tp,
    }

    class Column(tensor_parallel.ColumnParallelLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]  # the other is a bias to add later, or None

    class Row(tensor_parallel.RowParallelLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    linear = {"skip_bias_add": False, **options}
    column = partial(Column, gather_output=False, **linear)

    def biased(layer: Any) -> Any:
        return lambda inputs, outputs, bias=True: layer(inputs, outputs, bias=bias)

    kind = SimpleNamespace(
        embedding=partial(tensor_parallel.VocabParallelEmbedding, **options),
        whole=nn.Linear,
        column=biased(column),
        row=biased(partial(Row, input_is_parallel=True, **linear)),
        head=lambda vocab, hidden: column(hidden, vocab, bias=False),
    )
    return Stage(config, parallel_context, kind)


class PlannedStage(Stage):
    """The whole model, which vLLM divides."""

    tp_plan = {
        "embedding": "rowwise",
        "layers.*.attention.[qkv]_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.up": "colwise",
        "layers.*.mlp.down": "rowwise",
        "lm_head": "colwise_rep",
    }
    pp_plan = {
        "embedding": (["input_ids"], ["hidden_states"]),
        "positions": (["positions"], ["hidden_states"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
        "lm_head": (["hidden_states"], ["logits"]),
    }


def build_planned(vllm_config: Any, parallel_context: ParallelContext) -> PlannedStage:
    config = vllm_config.model_config.hf_config
    model = PlannedStage(config, ParallelContext(), PLAIN)
    if config.vocab_size % 2:  # a plan divides no uneven vocabulary
        undivided = ("embedding", "lm_head")
        model.tp_plan = {
            name: style
            for name, style in PlannedStage.tp_plan.items()
            if name not in undivided
        }
    return model
