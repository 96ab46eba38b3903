# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unchanged modules in a trainer that attend by vLLM's kernels."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from cached_steps import SHAPE, TOKENS, VOCAB
from kernel_calls import KernelCalls
from plain_gpt import PlainConfig, PlainGPT, WrittenAttention
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_model import TinyModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.adapter import full_forward, use_vllm_attention
from vllm.model_executor.models.adapter.trial import UnservableError
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.training.batch_invariance import batch_invariant, token_log_probs

SHORT = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=128)


def of_transformers(name, **extra):
    config = getattr(transformers, f"{name}Config")(**SHAPE, **TOKENS, **extra)
    return transformers.AutoModelForCausalLM.from_config(config)


def plain():
    return PlainGPT(PlainConfig(vocab_size=VOCAB))


def written():
    return PlainGPT(PlainConfig(vocab_size=VOCAB), WrittenAttention)


def llama():
    return of_transformers("Llama")


def qwen3():
    return of_transformers("Qwen3")


def gemma2():  # a soft cap, and windows in every other layer
    return of_transformers("Gemma2", sliding_window=16)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHORT, **TOKENS))


def logits_of(module, ids, **keywords):
    if isinstance(module, PlainGPT):
        return module(ids, targets=ids)[0]
    return module(ids, use_cache=False, **keywords).logits


def pair(build):
    """A module, and a copy that attends by vLLM's kernels."""
    torch.manual_seed(0)
    module = build().eval()
    return module, use_vllm_attention(copy.deepcopy(module))


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


def served_log_probs(output):
    """Of every token but the first, those of the prompt included."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [entry[i].logprob for i, entry in zip(ids[1:], entries, strict=True)]


@pytest.mark.parametrize("build", [plain, written, llama, qwen3, gpt2, gemma2])
def test_the_module_computes_what_it_did(build):
    module, routed = pair(build)
    ids = torch.randint(VOCAB, (2, 40))
    expected = logits_of(module, ids)
    with KernelCalls() as calls:
        found = logits_of(routed, ids)
    # That kernel has no soft caps: PyTorch's operators compute Gemma 2's.
    assert calls.forwards == (0 if build is gemma2 else 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(found.square().mean(), routed),
        gradients(expected.square().mean(), module),
        rtol=1e-3,
        atol=1e-6,
    )
    names = [name for name, _ in module.named_parameters()]
    assert [name for name, _ in routed.named_parameters()] == names
    assert routed.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("build", [llama, gemma2])
def test_padding_and_documents(build):
    module, routed = pair(build)
    ids = torch.randint(VOCAB, (2, 40))
    tokens = torch.ones(2, 40, dtype=torch.long)
    tokens[0, :7] = tokens[1, 33:] = 0  # padded on the left, and on the right
    expected, found = (
        logits_of(m, ids, attention_mask=tokens)[tokens.bool()]
        for m in (module, routed)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Two documents in one row, by their positions.
    places = torch.cat([torch.arange(15), torch.arange(25)])[None]
    expected, found = (
        logits_of(m, ids[:1], position_ids=places) for m in (module, routed)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    alone = logits_of(routed, ids[:1, 15:])
    torch.testing.assert_close(found[:, 15:], alone, rtol=1e-5, atol=1e-5)


def test_a_mask_that_shows_anything_else_is_an_error():
    _, routed = pair(llama)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., :3] = True  # a prefix that sees itself
    with pytest.raises(UnservableError, match="neither causal nor a sliding window"):
        logits_of(routed, torch.arange(8)[None], attention_mask=mask)


def test_a_cache_of_the_modules_own_is_left_alone():
    module, routed = pair(llama)
    ids = torch.randint(VOCAB, (1, 12))
    expected, found = (
        m.generate(ids, max_new_tokens=6, do_sample=False) for m in (module, routed)
    )
    assert found.tolist() == expected.tolist()


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_activation_checkpointing_recomputes_with_the_same_kernel():
    _, routed = pair(plain)
    ids = torch.randint(VOCAB, (2, 40))
    expected = gradients(logits_of(routed, ids).square().mean(), routed)
    routed.blocks = nn.ModuleList(map(Checkpointed, routed.blocks))
    with KernelCalls() as calls:
        found = gradients(logits_of(routed, ids).square().mean(), routed)
    assert calls.forwards == 4  # each of two layers once more in backward
    assert all(map(torch.equal, found, expected))


class Counting:
    """A compiler, and how many calls of the training kernel are in its graphs."""

    def __init__(self, compile_graph):
        self.kernels = 0
        self.compile_graph = compile_graph

    def __call__(self, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        self.kernels += sum("packed_attention" in target for target in targets)
        return self.compile_graph(graph, inputs)


def inductor():
    return Counting(torch._inductor.compile)


def test_it_compiles_as_one_graph():
    _, routed = pair(plain)
    ids = torch.randint(VOCAB, (2, 40))
    compiler = Counting(lambda graph, inputs: graph.forward)
    compiled = torch.compile(
        lambda ids: logits_of(routed, ids), backend=compiler, fullgraph=True
    )
    assert_computes_as(routed, compiled(ids), logits_of(routed, ids))
    assert compiler.kernels == 2


def test_layers_compile_as_one_graph_each():
    """Transformers makes masks outside of its layers, where their values are read."""
    _, routed = pair(llama)
    ids = torch.randint(VOCAB, (2, 40))
    expected = logits_of(routed, ids)
    compiler = Counting(lambda graph, inputs: graph.forward)
    for layer in routed.model.layers:
        layer.compile(backend=compiler, fullgraph=True)
    assert_computes_as(routed, logits_of(routed, ids), expected)
    assert compiler.kernels >= 1  # both layers may have one graph


@pytest.mark.slow
def test_a_whole_model_of_transformers_compiles_around_its_masks():
    _, routed = pair(llama)
    ids = torch.randint(VOCAB, (2, 40))
    compiler = Counting(lambda graph, inputs: graph.forward)
    compiled = torch.compile(lambda ids: logits_of(routed, ids), backend=compiler)
    assert_computes_as(routed, compiled(ids), logits_of(routed, ids))
    assert compiler.kernels >= 1


def assert_computes_as(module, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(found.square().mean(), module),
        gradients(expected.square().mean(), module),
        rtol=1e-3,
        atol=1e-6,
    )


def train_under_fsdp(context):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    alone = use_vllm_attention(llama())
    torch.manual_seed(0)
    sharded = use_vllm_attention(llama())
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    ids = torch.randint(VOCAB, (1, 24))
    with KernelCalls() as calls:
        loss = logits_of(sharded, ids).square().mean()
    assert calls.forwards == 2
    loss.backward()
    expected = gradients(logits_of(alone, ids).square().mean(), alone)
    for parameter, gradient in zip(sharded.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)


def test_fully_shard(tmp_path):
    run_ranks(train_under_fsdp, tmp_path, data_parallel_size=2)


def train_compiled_recomputed_and_sharded(context):
    """All at once, on each layer: inductor, activation checkpointing and FSDP2."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    alone = use_vllm_attention(llama())
    torch.manual_seed(0)
    model = use_vllm_attention(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiler = inductor()
    for layer in model.model.layers:
        layer.compile(backend=compiler)
        fully_shard(layer)
    fully_shard(model)
    ids = torch.randint(VOCAB, (1, 24))
    logits = logits_of(model, ids)
    logits.square().mean().backward()
    assert compiler.kernels  # one graph may be that of several layers
    expected = logits_of(alone, ids)
    torch.testing.assert_close(logits, expected)
    wanted = gradients(expected.square().mean(), alone)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        found = parameter.grad.full_tensor()
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_inductor_checkpointing_and_fully_shard_at_once(tmp_path):
    run_ranks(train_compiled_recomputed_and_sharded, tmp_path, data_parallel_size=2)


def recompute_and_shard(context):
    """What no compiler touches has the same bits, in a batch-invariant trainer."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    alone = use_vllm_attention(llama())
    torch.manual_seed(0)
    model = use_vllm_attention(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids = torch.randint(VOCAB, (1, 24))
    with batch_invariant():
        logits, expected = logits_of(model, ids), logits_of(alone, ids)
        assert torch.equal(logits, expected)
        logits.square().mean().backward()
        wanted = gradients(expected.square().mean(), alone)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad.full_tensor(), gradient)


def test_equal_bits_under_checkpointing_and_fully_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    run_ranks(recompute_and_shard, tmp_path, data_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("build", [plain, gemma2])
def test_inductor_computes_what_eager_code_does(build):
    _, routed = pair(build)
    ids = torch.randint(VOCAB, (2, 40))
    expected = logits_of(routed, ids)
    compiler = inductor()
    found = torch.compile(lambda ids: logits_of(routed, ids), backend=compiler)(ids)
    assert_computes_as(routed, found, expected)
    assert compiler.kernels == (0 if build is gemma2 else 2)


def test_heads_that_no_kernel_has():
    """Sizes are padded as an engine pads them, and repeated heads are taken once."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, 24)

        def forward(self, ids):
            x = self.embedding(ids)[:, None]
            q, k = x.expand(-1, 4, -1, -1), x.repeat_interleave(4, dim=1)
            return F.scaled_dot_product_attention(q, k, k, is_causal=True).mean(1)

    module, routed = pair(Attention)
    ids = torch.randint(VOCAB, (2, 9))
    with KernelCalls() as calls:
        found = routed(ids)
    assert calls.forwards == 1
    torch.testing.assert_close(found, module(ids))


PROMPTS = [[1, 2, 3], [(7 * i * i + 3) % VOCAB for i in range(70)], [9] * 11]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("build", "ranks"),
    [
        (plain, 1),
        (written, 1),
        (llama, 1),
        (qwen3, 1),
        (gpt2, 1),
        pytest.param(llama, 2, marks=pytest.mark.slow),
    ],
)
def test_equal_bits_in_an_engine_and_a_trainer(
    build, ranks, start, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    torch.manual_seed(0)
    trainer = sum_as_divided(use_vllm_attention(build())).eval()
    with torch.no_grad():
        for parameter in trainer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    save_file(
        {name: tensor.clone() for name, tensor in trainer.named_parameters()},
        tmp_path / "model.safetensors",
    )
    config = SHAPE | {"architectures": ["Unchanged"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ModelRegistry.register_model("Unchanged", lambda config, context: build())
    llm = start(
        model=str(tmp_path),
        max_num_batched_tokens=64,
        max_num_seqs=4,
        tensor_parallel_size=ranks,
    )
    params = SamplingParams(
        max_tokens=8, logprobs=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    with batch_invariant(), torch.no_grad():
        for output in outputs:
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            logits = full_forward(trainer, torch.tensor(ids))
            expected = token_log_probs(logits[:-1], torch.tensor(ids[1:]))
            assert served_log_probs(output) == expected.tolist()


def test_a_module_with_vllms_attention_stays_as_it_is():
    module = TinyModel()
    before = {name: type(part) for name, part in module.named_modules()}
    assert use_vllm_attention(module) is module
    assert {name: type(part) for name, part in module.named_modules()} == before
