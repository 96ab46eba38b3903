# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`tp_plan="auto"`: what is read from a module's forward."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from plain_gpt import PlainConfig, PlainGPT
from torch import nn

from vllm.model_executor.models.adapter.seen import token_ids
from vllm.model_executor.models.derived_plan.derive import _run_whole, derive_plan
from vllm.model_executor.models.derived_plan.flow import Flow
from vllm.model_executor.models.derived_plan.plan import plan_of
from vllm.model_executor.parallel_context import ParallelContext

VOCAB = 256
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
CPU = torch.device("cpu")


def plan(module, ranks=2):
    flow = Flow(VOCAB)
    _run_whole(module, None, token_ids(7, VOCAB, CPU), flow)
    return plan_of(flow, ranks)


def test_llama_gets_the_plan_of_transformers():
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    found = plan(module)
    layer = {
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }
    assert found.styles == {
        f"model.layers.{i}.{name}": style
        for i in range(2)
        for name, style in layer.items()
    } | {"model.embed_tokens": "rowwise", "lm_head": "colwise_rep"}
    assert not found.whole
    table = found.table(module).splitlines()
    assert len(table) == 9
    assert table[0].split() == [
        "model.layers.*.self_attn.q_proj",
        "[64,",
        "64]",
        "colwise",
    ]
    four = plan(module, 4)
    assert "4 and 2 heads" in four.whole["model.layers.0.self_attn.q_proj"]
    assert four.styles["model.layers.0.mlp.down_proj"] == "rowwise"


def test_a_fused_projection_stays_whole():
    found = plan(PlainGPT(PlainConfig(vocab_size=VOCAB)))
    assert "three linear layers" in found.whole["blocks.0.attention.qkv"]
    assert "three linear layers" in found.whole["blocks.0.attention.out"]
    assert found.styles == {
        "blocks.0.mlp.0": "colwise",
        "blocks.0.mlp.2": "rowwise",
        "blocks.1.mlp.0": "colwise",
        "blocks.1.mlp.2": "rowwise",
        "tokens": "rowwise",
        "unembed": "colwise_rep",
    }


def test_what_cannot_be_divided_is_named():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=64
    )
    module = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="finds no layers") as error:
        derive_plan(module, None, VOCAB, CPU, ParallelContext(tensor_parallel_size=2))
    assert "transformer.h.*.attn.c_attn" in str(error.value)
    assert "a Conv1D is no nn.Linear" in str(error.value)


class Hidden(nn.Module):
    """Layers whose outputs are mixed, or used twice, on the way."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.tokens = nn.Embedding(VOCAB, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids):
        x = self.tokens(ids)
        h = F.gelu(self.up(x))
        if self.kind == "norm":
            h = self.norm(h)
        x = x + self.down(h)
        if self.kind == "twice":
            x = x + h[..., :32]
        return self.head(x)


@pytest.mark.parametrize("kind", ["norm", "twice"])
def test_features_that_are_needed_whole(kind):
    found = plan(Hidden(kind))
    assert found.styles == {"tokens": "rowwise", "head": "colwise_rep"}
    assert plan(Hidden("")).styles.keys() == {"up", "down", "tokens", "head"}
