# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor parallelism: a rank's part of a module, as its `tp_plan` divides it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from planned_model import (
    HEADS,
    HIDDEN,
    TWO_RANKS,
    VOCAB,
    PlanModel,
    config,
    logits_of,
    trained,
)
from ranks import run_ranks
from torch import nn

from vllm.model_executor.layers import TrainableAttention, TrainableFlashAttention
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.models.plans.layers import (
    ColwiseEmbedding,
    ColwiseLinear,
    RowwiseEmbedding,
    RowwiseLinear,
)
from vllm.model_executor.models.plans.styles import STYLES
from vllm.model_executor.parallel_context import ParallelContext

BLOCK = "decoder.stack.layers.*"
BAD_TP_PLANS = {
    "nothing": (
        {f"{BLOCK}.querry_linear": "colwise"},
        (
            r"tp_plan has 'decoder.stack.layers.\*.querry_linear', which matches "
            r"nothing. The nearest names are decoder.stack.layers.\*.query_linear"
        ),
    ),
    "too short": ({"layers.*.up": "colwise"}, "which matches nothing"),
    "twice": (
        {f"{BLOCK}.up": "colwise", "*.*.layers.layer_1.up": "rowwise"},
        (
            r"names decoder.stack.layers.layer_1.up twice, by "
            r"'decoder.stack.layers.\*.up' and by '\*.\*.layers.layer_1.up'"
        ),
    ),
    "module and parameter": (
        {f"{BLOCK}.up": "colwise", f"{BLOCK}.up.weight": "rowwise"},
        r"names decoder.stack.layers.layer_0.up.weight twice, by",
    ),
    "style": (
        {"lm_head": "columnwise"},
        "'columnwise', which is not a style that",
    ),
    "kind": (
        {f"{BLOCK}.norm": "colwise"},
        "but decoder.stack.layers.layer_0.norm is a LayerNorm. Of modules, nn.Linear",
    ),
    "experts": ({f"{BLOCK}.up": "grouped_gemm"}, "of others, name the parameters"),
    "no dictionary": (["lm_head"], "tp_plan is a list; expected a dictionary"),
}


@pytest.mark.parametrize("case", BAD_TP_PLANS)
def test_bad_tensor_parallel_plan(case):
    plan, message = BAD_TP_PLANS[case]
    with pytest.raises(ValueError, match=message):
        apply_plans(PlanModel(tp_plan=plan), config(), TWO_RANKS)


def test_what_does_not_divide():
    model = PlanModel()
    context = ParallelContext(tensor_parallel_size=3)
    model.tp_plan = {f"{BLOCK}.up": "colwise"}
    message = (
        r"tp_plan has 'decoder.stack.layers.\*.up': 'colwise', but "
        r"decoder.stack.layers.layer_0.up.weight \[128, 64\] has 128 features on axis 0"
        ", which 3 tensor-parallel ranks do not divide"
    )
    with pytest.raises(ValueError, match=message):
        apply_plans(model, config(), context)


def test_heads_that_do_not_divide():
    message = (
        "splits the projections of decoder.stack.layers.layer_0.core.attention by .* "
        "2 query heads and 2 key and value heads cannot be divided by 4"
    )
    with pytest.raises(ValueError, match=message):
        apply_plans(PlanModel(), config(), ParallelContext(tensor_parallel_size=4))


def test_fused_projections():
    class Fused(nn.Module):
        tp_plan = {"qkv": "colwise"}

        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
            self.attention = TrainableAttention(HEADS, 32)

    with pytest.raises(ValueError, match="qkv gives query, key and value in one"):
        apply_plans(Fused(), config(), TWO_RANKS)


def test_a_tied_weight_that_is_split_once():
    model = PlanModel(tied=True, tp_plan={"lm_head": "colwise_rep"})
    message = "embedding.weight and lm_head.weight are one parameter, but tp_plan does"
    with pytest.raises(ValueError, match=message):
        apply_plans(model, config(), TWO_RANKS)


def test_only_attention_whose_projections_are_split_is_divided():
    class Two(nn.Module):
        tp_plan = {"first.[qkv]_proj": "colwise", "first.o_proj": "rowwise"}

        def __init__(self):
            super().__init__()
            self.first = TrainableFlashAttention(HIDDEN, HEADS)
            self.second = TrainableFlashAttention(HIDDEN, HEADS)

    model = apply_plans(Two(), config(), TWO_RANKS)
    assert model.first.attn.num_heads == 1
    assert model.second.attn.num_heads == HEADS


# ---- The classes of divided layers ---------------------------------------------------


class Scaled(nn.Linear):
    """A linear layer of a user's own class, with nn.Linear's forward."""

    scale = 2.0


class Divided(nn.Module):
    tp_plan = {
        "up": "colwise",
        "down": "rowwise",
        "own": "rowwise_rep",
        "head": "colwise_rep",
        "tokens": "rowwise",
        "features": "colwise_rep",
    }

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(HIDDEN, HIDDEN)
        self.down = nn.Linear(HIDDEN, HIDDEN)
        self.own = Scaled(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, HIDDEN)
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.features = nn.Embedding(VOCAB, HIDDEN)


def test_a_divided_layer_has_a_class_of_its_own():
    """So that it is seen whatever takes its place, and copies and pickles keep it."""
    whole = Divided()
    layers = dict(whole.named_children())
    part = apply_plans(whole, config(), TWO_RANKS)
    assert {name: type(layer) for name, layer in part.named_children()} == {
        "up": ColwiseLinear,
        "down": RowwiseLinear,
        "own": type(part.own),
        "head": ColwiseLinear,
        "tokens": RowwiseEmbedding,
        "features": ColwiseEmbedding,
    }
    assert isinstance(part.own, RowwiseLinear) and isinstance(part.own, Scaled)
    assert type(part.own).__name__ == "Scaled" and part.own.scale == 2.0
    for name, layer in part.named_children():
        assert layer is layers[name]
        assert isinstance(layer, nn.Linear | nn.Embedding)
        assert "forward" not in vars(layer)
        assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert part.head.gather_output and not part.up.gather_output
    assert part.down.input_is_parallel and not part.own.input_is_parallel
    assert type(copy.deepcopy(part).own) is type(part.own)
    assert type(pickle.loads(pickle.dumps(part.down))) is RowwiseLinear


def test_a_layer_with_a_forward_of_its_own():
    """That of an instance is kept, unless it would have to sum the outputs."""
    model = Divided()
    model.up.forward = lambda x: -F.linear(x, model.up.weight, model.up.bias)
    apply_plans(model, config(), TWO_RANKS)
    x = torch.ones(1, HIDDEN)
    torch.testing.assert_close(
        model.up(x), -F.linear(x, model.up.weight, model.up.bias)
    )
    assert isinstance(model.up, ColwiseLinear)

    model = Divided()
    model.down.forward = lambda x: -F.linear(x, model.down.weight, model.down.bias)
    with pytest.raises(ValueError, match="'rowwise', but down is a Linear"):
        apply_plans(model, config(), TWO_RANKS)


# ---- Ranks ---------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts fused into two parameters, as in Transformers."""

    num_experts = 4

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 2 * HIDDEN, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(4, HIDDEN, HIDDEN))

    def forward(self, x, indices, scores):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, choice = (indices == expert).nonzero(as_tuple=True)
            h = x[token] @ self.gate_up_proj[expert].T
            gate, up = h.chunk(2, dim=-1)
            h = (F.silu(gate) * up) @ self.down_proj[expert].T
            out.index_add_(0, token, h * scores[token, choice, None])
        return out


class Router(nn.Module):
    num_experts = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, HIDDEN))

    def forward(self, x):
        logits = F.linear(x, self.weight)
        scores, indices = logits.softmax(-1).topk(2)
        return logits, scores, indices


class EveryStyle(nn.Module):
    """Uses each style; `divided` says how the experts are."""

    def __init__(self, divided):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.wide_embedding = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.gate_up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.packed_down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.gathered = nn.Linear(HIDDEN, HIDDEN)
        self.spread = nn.Linear(HIDDEN, HIDDEN)
        self.router = Router()
        self.experts = Experts()
        self.tp_plan = {
            "embedding": "embedding_rowwise",
            "wide_embedding": "colwise_rep",
            "norm": "sequence_parallel",
            "up": "colwise",
            "down": "rowwise",
            "gate_up": "packed_colwise",
            "packed_down": "rowwise",
            "gathered": "colwise_gather_output",
            "spread": "rowwise_rep",
            "experts": "moe_tp_experts",
        }
        if divided == "experts":
            self.tp_plan["router"] = "ep_router"
            self.tp_plan["experts.*_proj"] = "grouped_gemm"
        else:
            self.tp_plan["experts.gate_up_proj"] = "packed_colwise"
            self.tp_plan["experts.down_proj"] = "rowwise"

    def forward(self, ids):
        x = self.norm(self.embedding(ids) + self.wide_embedding(ids))
        x = x + self.down(F.gelu(self.up(x)))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        x = x + self.packed_down(F.silu(gate) * up)
        x = x + self.spread(F.gelu(self.gathered(x)))
        _, scores, indices = self.router(x)
        return x + self.experts(x, indices, scores)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, input):
        return super().forward(input) * torch.tensor(3.0).to(self.weight.dtype)


class ScaledTokens(nn.Module):
    tp_plan = {"tokens": "embedding_rowwise"}

    def __init__(self):
        super().__init__()
        self.tokens = ScaledEmbedding(VOCAB, HIDDEN)

    def forward(self, ids):
        return self.tokens(ids)


@torch.no_grad()
def every_style_computes_the_same(context: ParallelContext) -> None:
    ids = torch.tensor([0, 1, VOCAB // 2, VOCAB - 1])
    for divided in ("features", "experts"):
        torch.manual_seed(0)
        whole = EveryStyle(divided)
        for parameter in whole.parameters():
            parameter.normal_(std=0.1)
        expected = whole(ids)
        part = apply_plans(EveryStyle(divided), config(), context)
        assert list(part.state_dict()) == list(whole.state_dict())
        load_full_checkpoint(part, whole.state_dict().items(), context)
        torch.testing.assert_close(part(ids), expected, rtol=1e-4, atol=1e-4)
        size = sum(p.numel() for p in part.parameters())
        assert size < 0.55 * sum(p.numel() for p in whole.parameters())

    torch.manual_seed(0)
    scaled = ScaledTokens()
    expected = scaled(ids)
    part = apply_plans(scaled, config(), context)
    assert part.tokens.weight.shape == (VOCAB // 2, HIDDEN)
    torch.testing.assert_close(part(ids), expected)

    for tied in (False, True):
        whole = trained(nn.ModuleList, tied)
        part = apply_plans(PlanModel(nn.ModuleList, tied), config(), context)
        load_full_checkpoint(part, whole.state_dict().items(), context)
        torch.testing.assert_close(
            logits_of(part, ids), logits_of(whole, ids), rtol=1e-4, atol=1e-4
        )


def test_ranks_compute_what_the_whole_module_does(tmp_path):
    run_ranks(every_style_computes_the_same, tmp_path, tensor_parallel_size=2)


def test_the_styles_are_those_of_transformers():
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    theirs = set(tensor_parallel.ALL_PARALLEL_STYLES.keys())
    # Those that move tokens between ranks by kernels of their own.
    unserved = {"ep_dispatch_experts", "megamoe_router", "megamoe_experts"}
    assert theirs - unserved <= STYLES.keys()
