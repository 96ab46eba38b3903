# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext

SIZES = [1, 2]


def tensors_of(shapes):
    """Tensors whose every element is different, so that a wrong slice shows."""
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        for name, shape in shapes.items()
    }


def slice_of(tensor, axis, context, chunks=1):
    """`chunks` equal parts of the axis, this rank's slice of each."""
    size, rank = context.tensor_parallel_size, context.tensor_parallel_rank
    parts = [part.chunk(size, axis)[rank] for part in tensor.chunk(chunks, axis)]
    return torch.cat(parts, axis)


class TestPlain:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.norm = nn.BatchNorm1d(4)
            self.lm_head = nn.Linear(4, 6, bias=False)
            self.lm_head.weight = self.embedding.weight

    def weights(self):
        return {name: t.clone() for name, t in self.Tied().state_dict().items()}

    def test_parameters_and_buffers(self):
        weights = self.weights() | {"norm.running_mean": torch.full((4,), 7.0)}
        module = self.Tied()
        loaded = load_full_checkpoint(module, weights.items(), ParallelContext())
        assert loaded == weights.keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, weights[name]), name

    def test_one_name_of_a_tied_parameter_is_enough(self):
        weights = self.weights()
        del weights["lm_head.weight"]
        module = self.Tied()
        loaded = load_full_checkpoint(module, weights.items(), ParallelContext())
        assert "lm_head.weight" in loaded
        assert torch.equal(module.lm_head.weight, weights["embedding.weight"])

    def test_every_misfit_is_named(self):
        weights = self.weights()
        weights["extra.weight"] = torch.ones(2)
        weights["norm.bias"] = torch.ones(5)
        del weights["norm.weight"]
        with pytest.raises(ValueError) as error:
            load_full_checkpoint(
                self.Tied(), weights.items(), ParallelContext(), source="here.pt"
            )
        message = str(error.value)
        assert message.startswith("here.pt does not fit Tied: 1 missing: norm.weight;")
        assert "1 surplus: extra.weight" in message
        assert "1 mis-shaped: norm.bias [5], expected [4]" in message

    def test_a_nested_state_dict_is_not_tensors(self):
        with pytest.raises(ValueError, match="surplus: model .a dict, not a tensor"):
            load_full_checkpoint(
                self.Tied(), {"model": self.weights()}.items(), ParallelContext()
            )

    def test_random_weights_never_stay(self):
        with pytest.raises(ValueError, match="7 missing: "):
            load_full_checkpoint(self.Tied(), [], ParallelContext(), source="empty")


def load_vllm_layers(context):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = VocabParallelEmbedding(10, 8)
            self.qkv = QKVParallelLinear(8, 4, 4, 1)  # one KV head: replicated at TP=2
            self.gate_up = MergedColumnParallelLinear(8, [6, 6], bias=False)
            self.up = ColumnParallelLinear(8, 6)
            self.down = RowParallelLinear(6, 8)
            self.norm = ReplicatedLinear(8, 8)
            self.head = ParallelLMHead(10, 8)

    weights = tensors_of(
        {
            "embedding.weight": (10, 8),
            "qkv.weight": (24, 8),
            "qkv.bias": (24,),
            "gate_up.weight": (12, 8),
            "up.weight": (6, 8),
            "up.bias": (6,),
            "down.weight": (8, 6),
            "down.bias": (8,),
            "norm.weight": (8, 8),
            "norm.bias": (8,),
            "head.weight": (10, 8),
        }
    )
    model = Model()
    assert load_full_checkpoint(model, weights.items(), context) == weights.keys()

    def same(name, expected):
        actual = model.get_parameter(name)[: expected.shape[0]]
        assert torch.equal(actual, expected), name

    for name in ("qkv.weight", "qkv.bias"):
        query, key_value = weights[name].split([16, 8])
        same(name, torch.cat([slice_of(query, 0, context), key_value]))
    same("gate_up.weight", slice_of(weights["gate_up.weight"], 0, context, chunks=2))
    same("up.weight", slice_of(weights["up.weight"], 0, context))
    same("up.bias", slice_of(weights["up.bias"], 0, context))
    same("down.weight", slice_of(weights["down.weight"], 1, context))
    for name in ("down.bias", "norm.weight", "norm.bias"):
        same(name, weights[name])
    rows = slice(0, 10) if context.world_size == 1 else None
    for name in ("embedding.weight", "head.weight"):
        shard = model.get_submodule(name.split(".")[0]).shard_indices
        rows = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
        same(name, weights[name][rows])

    # A tensor that is too long on the sharded axis must not be cut to fit.
    weights["up.weight"] = torch.ones(12, 8)
    with pytest.raises(ValueError, match=r"up.weight \[12, 8\], expected \[6, 8\]"):
        load_full_checkpoint(Model(), weights.items(), context)


def load_megatron_layers(context):
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear as MegatronColumn,
    )
    from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRow
    from megatron.core.tensor_parallel.layers import (
        VocabParallelEmbedding as MegatronEmbedding,
    )
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=context.tensor_parallel_size,
    )
    group = context.megatron_groups().tp
    options = {"config": config, "init_method": nn.init.ones_, "tp_group": group}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = MegatronEmbedding(10, 8, **options)
            self.fc1 = MegatronColumn(8, 12, stride=2, **options)
            self.fc2 = MegatronRow(
                6,
                8,
                bias=True,
                input_is_parallel=True,
                skip_bias_add=False,
                **options,
            )

    weights = tensors_of(
        {
            "embedding.weight": (10, 8),
            "fc1.weight": (12, 8),
            "fc1.bias": (12,),
            "fc2.weight": (8, 6),
            "fc2.bias": (8,),
        }
    )
    model = Model()
    loaded = load_full_checkpoint(model, weights.items(), context)
    assert loaded == weights.keys()
    for name, expected in {
        "embedding.weight": slice_of(weights["embedding.weight"], 0, context),
        "fc1.weight": slice_of(weights["fc1.weight"], 0, context, chunks=2),
        "fc1.bias": slice_of(weights["fc1.bias"], 0, context, chunks=2),
        "fc2.weight": slice_of(weights["fc2.weight"], 1, context),
        "fc2.bias": weights["fc2.bias"],
    }.items():
        assert torch.equal(model.get_parameter(name), expected), name


def load_dtensors(context):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    parallelize_module(
        model,
        context.device_mesh()["tp"],
        {"0": ColwiseParallel(), "1": RowwiseParallel()},
    )
    weights = tensors_of(
        {"0.weight": (12, 8), "0.bias": (12,), "1.weight": (8, 12), "1.bias": (8,)}
    )
    assert load_full_checkpoint(model, weights.items(), context) == weights.keys()
    for name, axis in {"0.weight": 0, "0.bias": 0, "1.weight": 1}.items():
        local = model.get_parameter(name).to_local()
        assert torch.equal(local, slice_of(weights[name], axis, context)), name
    assert torch.equal(model[1].bias.to_local(), weights["1.bias"])


def load_all_kinds(context):
    """Together, because starting the ranks takes most of the time."""
    load_vllm_layers(context)
    load_megatron_layers(context)
    load_dtensors(context)


@pytest.mark.parametrize("tensor_parallel_size", SIZES)
def test_every_rank_takes_its_shard(tensor_parallel_size, tmp_path):
    run_ranks(load_all_kinds, tmp_path, tensor_parallel_size)


def load_stages(context):
    """Each pipeline stage takes its part, and only what none takes is surplus."""
    rank = context.pipeline_parallel_rank
    own = ["embedding.weight", "layers.0.weight"] if rank == 0 else ["layers.1.weight"]

    def build():
        layers = {str(rank): nn.Linear(4, 4, bias=False)}
        stage = nn.ModuleDict({"layers": nn.ModuleDict(layers)})
        if context.is_first_stage:
            stage["embedding"] = nn.Embedding(6, 4)
        return stage

    weights = tensors_of(
        {"embedding.weight": (6, 4), "layers.0.weight": (4, 4)}
        | {"layers.1.weight": (4, 4)}
    )
    stage = build()
    assert load_full_checkpoint(stage, weights.items(), context) == set(own)
    for name in own:
        assert torch.equal(stage.get_parameter(name), weights[name]), name

    extra = weights | {"layers.2.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match="1 surplus: layers.2.weight"):
        load_full_checkpoint(build(), extra.items(), context)
    del weights["layers.1.weight"]
    if rank == 0:
        load_full_checkpoint(build(), weights.items(), context)
    else:
        with pytest.raises(ValueError, match="1 missing: layers.1.weight"):
            load_full_checkpoint(build(), weights.items(), context)


class NoAttention(nn.Module):
    """Stands in for Megatron's core attention, which asks for CUDA."""

    def __init__(self, **_):
        super().__init__()


def load_megatron_stages(context):
    """Layers find their place, and a copy of the embedding its name."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    def build(groups):
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention.submodules.core_attention = NoAttention
        config = TransformerConfig(
            num_layers=3,
            hidden_size=8,
            num_attention_heads=2,
            use_cpu_initialization=True,
            pipeline_model_parallel_size=groups.pp.size(),
            num_layers_in_first_pipeline_stage=2 if groups.pp.size() > 1 else None,
            pipeline_dtype=torch.float32,
        )
        return GPTModel(
            config,
            spec,
            vocab_size=10,
            max_sequence_length=4,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
            share_embeddings_and_output_weights=True,
            pg_collection=groups,
        )

    unstaged = context.megatron_groups()
    unstaged.pp = unstaged.cp  # of one rank
    torch.manual_seed(0)
    whole = {
        name: torch.randn_like(tensor)
        for name, tensor in build(unstaged).state_dict().items()
        if tensor is not None
    }
    stage = build(context.megatron_groups())
    loaded = load_full_checkpoint(stage, whole.items(), context)
    assert loaded == {name for name, _ in stage.named_parameters()}
    for name, tensor in stage.named_parameters():
        if name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        if not context.is_first_stage:
            name = name.replace("decoder.layers.0.", "decoder.layers.2.")
        assert torch.equal(tensor, whole[name]), name


def load_megatron_experts(context):
    """Experts find their place; without expert parallelism all ranks divide each."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    def build(groups):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            use_cpu_initialization=True,
            add_bias_linear=False,
            num_moe_experts=4,
            moe_ffn_hidden_size=12,
            tensor_model_parallel_size=groups.tp.size(),
            expert_model_parallel_size=groups.ep.size(),
            expert_tensor_parallel_size=groups.expt_tp.size(),
        )
        spec = get_moe_module_spec(use_te=False, num_experts=4)
        return build_module(spec, config=config, pg_collection=groups)

    alone = context.megatron_groups()
    for name in ("tp", "tp_cp", "ep", "tp_ep", "expt_tp"):
        setattr(alone, name, alone.cp)  # of one rank
    whole = tensors_of(
        {
            name: t.shape
            for name, t in build(alone).state_dict().items()
            if t is not None
        }
    )
    module = build(context.megatron_groups())
    load_full_checkpoint(module, whole.items(), context)
    experts = module.experts.local_experts
    first = context.expert_parallel_rank * len(experts)
    assert len(experts) == 4 // context.expert_parallel_size
    for index, expert in enumerate(experts):
        stem = f"experts.local_experts.{first + index}"
        for name, axis in {"linear_fc1.weight": 0, "linear_fc2.weight": 1}.items():
            expected = whole[f"{stem}.{name}"]
            if context.expert_parallel_size == 1:
                expected = slice_of(expected, axis, context)
            assert torch.equal(expert.get_parameter(name), expected), f"{stem}.{name}"


def load_experts(context):
    """Each expert-parallel rank takes its experts."""
    rank = context.expert_parallel_rank
    module = nn.ModuleDict({str(rank): nn.Linear(4, 4, bias=False)})
    weights = tensors_of({"0.weight": (4, 4), "1.weight": (4, 4)})
    assert load_full_checkpoint(module, weights.items(), context) == {f"{rank}.weight"}
    assert torch.equal(module[str(rank)].weight, weights[f"{rank}.weight"])


def load_all_stages(context):
    load_stages(context)
    load_megatron_stages(context)


def test_every_stage_takes_its_part(tmp_path):
    run_ranks(load_all_stages, tmp_path, pipeline_parallel_size=2)


def test_every_rank_takes_its_experts(tmp_path):
    run_ranks(load_experts, tmp_path, data_parallel_size=2, enable_expert_parallel=True)


@pytest.mark.parametrize("enable_expert_parallel", [False, True])
def test_megatron_experts(enable_expert_parallel, tmp_path):
    run_ranks(
        load_megatron_experts,
        tmp_path,
        tensor_parallel_size=2,
        enable_expert_parallel=enable_expert_parallel,
    )
