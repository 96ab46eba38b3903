# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plain modules, made parallel by their plans."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from vllm import ModelRegistry
from vllm.model_executor.layers import TrainableAttention, TrainableFlashAttention
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.parallel_plan import STYLES, apply_plans
from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_validation import validate
from vllm.sequence import IntermediateTensors

VOCAB, HIDDEN, HEADS, LAYERS = 128, 64, 2, 3
CONFIG = {
    "architectures": ["PlanModel"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
TWO_RANKS = ParallelContext(tensor_parallel_size=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query_linear = nn.Linear(HIDDEN, HIDDEN)
        self.key_linear = nn.Linear(HIDDEN, HIDDEN)
        self.value_linear = nn.Linear(HIDDEN, HIDDEN)
        self.core = nn.ModuleDict({"attention": TrainableAttention(HEADS, 32)})
        self.output_linear = nn.Linear(HIDDEN, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = self.query_linear(h), self.key_linear(h), self.value_linear(h)
        x = x + self.output_linear(self.core["attention"](q, k, v))
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, kind):
        super().__init__()
        blocks = [Block() for _ in range(LAYERS)]
        if kind is nn.ModuleDict:
            blocks = {f"layer_{i}": block for i, block in enumerate(blocks)}
        self.layers = kind(blocks)

    def forward(self, hidden_states):
        layers = self.layers
        for layer in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class PlanModel(nn.Module):
    """Two embeddings before its stack, and a norm after it that no plan names."""

    tp_plan = {
        "embedding": "rowwise",
        "decoder.stack.layers.*.query_linear": "colwise",
        "decoder.stack.layers.*.key_linear": "colwise",
        "decoder.stack.layers.*.value_linear": "colwise",
        "decoder.stack.layers.*.output_linear": "rowwise",
        "decoder.stack.layers.*.up": "colwise",
        "decoder.stack.layers.*.down": "rowwise",
        "lm_head": "colwise_rep",
    }
    pp_plan = {
        "embedding": (["input_ids"], ["hidden_states"]),
        "positions": (["positions"], ["hidden_states"]),
        "decoder.stack.layers": (["hidden_states"], ["hidden_states"]),
        "lm_head": (["hidden_states"], ["logits"]),
    }

    def __init__(self, kind=nn.ModuleDict, tied=False, **plans):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(128, HIDDEN)
        self.decoder = nn.ModuleDict({"stack": Stack(kind)})
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight
        for name, plan in plans.items():
            setattr(self, name, plan)

    def forward(self, input_ids, positions):
        x = self.embedding(input_ids) + self.positions(positions)
        return self.norm(self.decoder["stack"](x))

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)


def trained(kind=nn.ModuleDict, tied=False) -> PlanModel:
    generator = torch.Generator().manual_seed(0)
    model = PlanModel(kind, tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def logits_of(model, ids):
    return model.compute_logits(model(ids, torch.arange(len(ids))))


def config(**hf_config):
    """What `apply_plans` asks of an engine's config."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(**hf_config), get_hidden_size=lambda: HIDDEN
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def llama_config():
    vllm_config = config()
    vllm_config.model_config.hf_config = LlamaConfig()
    assert LlamaConfig.base_model_tp_plan
    return vllm_config


# ---- Errors --------------------------------------------------------------------------

LAYERS_ENTRY = {"decoder.stack.layers": (["hidden_states"], ["hidden_states"])}
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
BAD_PP_PLANS = {
    "nothing": (
        {"decoder.stak.layers": (["x"], ["x"])},
        (
            "pp_plan has 'decoder.stak.layers', which matches nothing. The nearest "
            "names are decoder.stack.layers"
        ),
    ),
    "two matches": (
        LAYERS_ENTRY | {"decoder.stack.layers.*": (["x"], ["x"])},
        "matches decoder.stack.layers.layer_0 and decoder.stack.layers.layer_1",
    ),
    "twice": (
        LAYERS_ENTRY | {"decoder.stack": (["x"], ["x"])},
        "names decoder.stack twice, by 'decoder.stack.layers' and by 'decoder.stack'",
    ),
    "no stack": ({"embedding": (["x"], ["x"])}, "names 0 stacks of layers"),
    "no-split": (
        LAYERS_ENTRY | {"norm": (["x"], ["x"])},
        "'decoder.stack.layers', which cuts inside decoder.stack, a Stack;",
    ),
    "two tensors": (
        {"decoder.stack.layers": (["x", "residual"], ["x", "residual"])},
        "expected .*, because a stage hands over one tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_TP_PLANS)
def test_bad_tensor_parallel_plan(case):
    plan, message = BAD_TP_PLANS[case]
    with pytest.raises(ValueError, match=message):
        apply_plans(PlanModel(tp_plan=plan), config(), TWO_RANKS)


@pytest.mark.parametrize("case", BAD_PP_PLANS)
def test_bad_pipeline_parallel_plan(case):
    plan, message = BAD_PP_PLANS[case]
    model = PlanModel(pp_plan=plan)
    if case == "no-split":
        model._no_split_modules = {"Stack"}
    with pytest.raises(ValueError, match=message):
        apply_plans(model, config(), ParallelContext(pipeline_parallel_size=2))


def test_plans_are_checked_at_one_rank_too():
    for name, plan, message in [
        ("tp_plan", {"lm_hed": "colwise"}, "matches nothing"),
        ("tp_plan", {"norm": "colwise"}, "is a LayerNorm"),
        ("pp_plan", {"hed": (["x"], ["x"])}, "matches nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_plans(PlanModel(**{name: plan}), config(), ParallelContext())


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


def test_an_empty_stage():
    with pytest.raises(ValueError, match="stage 3 of 4 is left empty: 'decoder.stack."):
        apply_plans(PlanModel(), config(), ParallelContext(pipeline_parallel_size=4))


def test_a_tied_weight_that_is_split_once():
    model = PlanModel(tied=True, tp_plan={"lm_head": "colwise_rep"})
    message = "embedding.weight and lm_head.weight are one parameter, but tp_plan does"
    with pytest.raises(ValueError, match=message):
        apply_plans(model, config(), TWO_RANKS)


# ---- Where plans are found -----------------------------------------------------------


class TestFinding:
    def test_without_a_plan_nothing_changes(self):
        model = PlanModel(tp_plan=None, pp_plan=None)
        before = dict(model.named_parameters())
        assert apply_plans(model, config(), TWO_RANKS) is model
        assert dict(model.named_parameters()) == before

    @pytest.mark.parametrize("name", ["tp_plan", "_tp_plan"])
    def test_a_submodules_names_are_relative_to_it(self, name):
        model = PlanModel(tp_plan=None)
        setattr(model.decoder["stack"], name, {"layers.*.up": "colwise"})
        apply_plans(model, config(), TWO_RANKS)
        up = model.decoder["stack"].layers["layer_2"].up
        assert up.weight.shape == (HIDDEN, HIDDEN) and up.out_features == HIDDEN

    def test_plans_of_the_config_count_if_there_is_no_other(self):
        plans = {"base_model_tp_plan": {"lm_head": "colwise_rep"}}
        model = PlanModel(tp_plan=None)
        apply_plans(model, config(**plans), TWO_RANKS)
        assert model.lm_head.weight.shape == (VOCAB // 2, HIDDEN)
        model = PlanModel(tp_plan={"embedding": "rowwise"})
        apply_plans(model, config(**plans), TWO_RANKS)
        assert model.lm_head.weight.shape == (VOCAB, HIDDEN)

    def test_plans_of_a_config_class_are_for_all_its_models(self):
        # A plain module with a Llama's config, and a model of the family without
        # what some of its patterns name.
        apply_plans(PlanModel(tp_plan=None), llama_config(), TWO_RANKS)
        model = PlanModel(tp_plan={"layers.*.mlp.up_proj": "colwise"}, pp_plan=None)
        with pytest.raises(ValueError, match="matches nothing"):
            apply_plans(model, config(), TWO_RANKS)
        model.config = LlamaConfig()
        apply_plans(model, config(), TWO_RANKS)

    def test_tied_embeddings_of_a_config_class_are_no_plan_of_the_users(self):
        tied = LlamaConfig(tie_word_embeddings=True)
        assert "embed_tokens" in tied.base_model_tp_plan
        for module_config in (None, tied):
            model = PlanModel(tp_plan=None)
            model.config = module_config
            hf_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=tied))
            apply_plans(model, hf_config, TWO_RANKS)

    @pytest.mark.parametrize("attribute", ["tp_plan", "_tp_plan"])
    def test_an_empty_plan_on_the_module_means_none(self, attribute):
        model = PlanModel(tp_plan=None)
        model.decoder["stack"].tp_plan = {"layers.*.up": "colwise"}
        setattr(model, attribute, {})
        plans = {"base_model_tp_plan": {"lm_head": "colwise_rep"}}
        apply_plans(model, config(**plans), TWO_RANKS)
        assert model.lm_head.weight.shape == (VOCAB, HIDDEN)
        assert model.decoder["stack"].layers["layer_2"].up.out_features == 2 * HIDDEN

    def test_what_transformers_wrote_is_checked_where_it_divides(self):
        gemma = Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
        )
        with torch.device("meta"):
            model = Gemma2ForCausalLM(gemma)
        hf_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=gemma))
        apply_plans(model, hf_config, ParallelContext())
        with pytest.raises(ValueError, match="Gemma2TextScaledWordEmbedding"):
            apply_plans(model, hf_config, TWO_RANKS)
        # What the user adds is checked in any case.
        model.tp_plan = {"no_such": "colwise"}
        with pytest.raises(ValueError, match="'no_such', which matches nothing"):
            apply_plans(model, hf_config, ParallelContext())

    def test_two_plans_that_differ(self):
        model = PlanModel(_tp_plan={"lm_head": "rowwise_rep"})
        with pytest.raises(ValueError, match="two plans name 'lm_head', as 'colwise_r"):
            apply_plans(model, config(), TWO_RANKS)

    def test_only_attention_whose_projections_are_split_is_divided(self):
        class Two(nn.Module):
            tp_plan = {"first.[qkv]_proj": "colwise", "first.o_proj": "rowwise"}

            def __init__(self):
                super().__init__()
                self.first = TrainableFlashAttention(HIDDEN, HEADS)
                self.second = TrainableFlashAttention(HIDDEN, HEADS)

        model = apply_plans(Two(), config(), TWO_RANKS)
        assert model.first.attn.num_heads == 1
        assert model.second.attn.num_heads == HEADS


# ---- Pipeline stages, chained in this process ----------------------------------------


def stages_of(model_cls, weights, size):
    stages = []
    for rank in range(size):
        context = ParallelContext(
            pipeline_parallel_size=size, pipeline_parallel_rank=rank
        )
        stage = apply_plans(model_cls(), config(), context)
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()})
        stages.append(stage)
    return stages


def run_stages(stages, ids):
    handed = None
    for stage in stages:
        # later stages do not know the tokens
        known = ids if handed is None else torch.full_like(ids, -1)
        handed = stage(known, torch.arange(len(ids)), intermediate_tensors=handed)
    return stages[-1].compute_logits(handed)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
@torch.no_grad()
def test_stages_compute_what_the_whole_module_does(kind, size):
    model = trained(kind)
    stages = stages_of(lambda: PlanModel(kind), model.state_dict(), size)
    ids = torch.arange(7)
    torch.testing.assert_close(run_stages(stages, ids), logits_of(model, ids))
    assert isinstance(
        stages[0](ids, torch.arange(7), intermediate_tensors=None), IntermediateTensors
    )
    # Each tensor of the checkpoint keeps its name; layers are on one stage only.
    names = [set(stage.state_dict()) for stage in stages]
    assert set().union(*names) == set(model.state_dict())
    for name in model.state_dict():
        held = sum(name in stage for stage in names)
        assert held == (size if name.startswith("norm.") else 1), name


def test_a_layer_that_is_on_two_stages():
    model = PlanModel()
    layers = model.decoder["stack"].layers
    layers["layer_2"] = layers["layer_0"]
    with pytest.raises(ValueError, match="layer_2 shares weights with another pipel"):
        apply_plans(model, config(), ParallelContext(pipeline_parallel_size=2))


@torch.no_grad()
def test_stages_with_tied_weights():
    model = trained(tied=True)
    stages = stages_of(lambda: PlanModel(tied=True), model.state_dict(), 3)
    ids = torch.arange(7)
    torch.testing.assert_close(run_stages(stages, ids), logits_of(model, ids))
    # Both ends have it, by either name.
    for stage in (stages[0], stages[2]):
        weights = dict(stage.named_parameters(remove_duplicate=False))
        assert weights["embedding.weight"] is weights["lm_head.weight"]
    assert "lm_head.weight" not in stages[1].state_dict()


# ---- Tensor-parallel ranks -----------------------------------------------------------


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


# ---- The engine ----------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_served_by_its_plans(start, tmp_path, monkeypatch, tp, pp):
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    ModelRegistry.register_model(
        "PlanModel", lambda c, p: PlanModel(), supports_pp=True
    )
    model = trained()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    llm = start(
        model=str(tmp_path),
        processes=True,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        max_logprobs=-1,
    )
    report = validate(
        llm, functools.partial(logits_of, model), [[1, 2, 3], list(range(40))], 16
    )
    assert report.passed, report.to_json()
    assert len(report.generated) == 32
