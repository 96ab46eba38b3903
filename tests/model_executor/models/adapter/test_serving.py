# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unchanged modules in an engine, against their own forward."""

import copy
import json
import logging
from itertools import product

import pytest
import torch
import transformers
from cached_steps import SHAPE, TOKENS, VOCAB, heads_of_sites
from peft import LoraConfig, get_peft_model
from plain_gpt import PlainConfig, PlainGPT, WrittenAttention
from safetensors.torch import save_file
from torch import nn

from vllm import ModelRegistry, SamplingParams
from vllm.compilation import registered_model
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.adapter import Adapter, full_forward
from vllm.model_executor.models.adapter.calls import UnservableError
from vllm.model_executor.models.adapter.merged_products import LINEAR
from vllm.model_validation import validate

PROMPTS = [[1, 2, 3], [(7 * i * i + 3) % VOCAB for i in range(70)], [9] * 11]
SHORT = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=128)


def plain():
    return PlainGPT(PlainConfig(vocab_size=VOCAB))


def written():
    return PlainGPT(PlainConfig(vocab_size=VOCAB), WrittenAttention)


def llama():
    config = transformers.LlamaConfig(**SHAPE, **TOKENS)
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHORT, **TOKENS))


def call_with_labels(module, input_ids, positions):
    return module(input_ids, targets=input_ids)


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def serve(start, tmp_path):
    def served(build, **options):
        torch.manual_seed(0)
        module = build()
        state = {name: t.clone() for name, t in module.named_parameters()}
        save_file(state, tmp_path / "model.safetensors")
        config = SHAPE | {"architectures": ["Unchanged"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        defaults = {
            "model": str(tmp_path),
            "max_logprobs": -1,
            "max_num_batched_tokens": 64,  # the long prompt takes two steps
        }
        return start(**defaults | options), module

    return served


def assert_same(llm, module):
    report = validate(llm, lambda ids: full_forward(module, ids), PROMPTS, max_tokens=8)
    assert report.exit_code == 0, str(report)
    values = {check.name: check.value for check in report.checks}
    assert values["greedy agreement"] == 1
    assert values["max |Δ log p|"] < 1e-4


@pytest.mark.engine
@pytest.mark.parametrize("build", [llama, gpt2])
def test_transformers(serve, build):
    ModelRegistry.register_model("Unchanged", lambda config, context: build())
    llm, module = serve(build)
    assert_same(llm, module)
    names = llm.apply_model(lambda model: [n for n, _ in model.named_parameters()])[0]
    assert names == [name for name, _ in module.named_parameters()]
    # The self-check and others can call the engine's own module.
    ids = torch.arange(20)
    (logits,) = llm.apply_model(lambda model: model.adapted.full_forward(ids))
    assert torch.equal(logits, full_forward(module, ids))


def is_compiled(model):
    return not model.do_not_compile


def products(model):
    (graph,) = model.adapted._recorded.values()
    return len(graph.graph.find_nodes(op="call_function", target=LINEAR))


@pytest.mark.engine
@pytest.mark.parametrize("build", [llama, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_it_is_compiled(serve, build):
    """A prompt in chunks, and steps of one token, by one recording of the forward."""
    ModelRegistry.register_model("Unchanged", lambda config, context: build())
    llm, module = serve(build, enforce_eager=False)
    assert llm.apply_model(is_compiled) == [True]
    assert_same(llm, module)
    # Of a Llama's seven in a layer four are left: qkv, o, gate and up, down.
    layers, of_layer = SHAPE["num_hidden_layers"], 4  # GPT-2 has no nn.Linear there
    assert llm.apply_model(products) == [layers * of_layer if build is llama else 0]

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    state = {name: p.detach() for name, p in module.named_parameters()}
    llm.apply_model(lambda model: model.load_weights(state.items()))
    llm.reset_prefix_cache()
    assert_same(llm, module)


def record_by_hand(model):
    """On a CPU vLLM compiles nothing with adapters, but a recording runs without."""
    if model.do_not_compile:
        ids = torch.zeros(8, dtype=torch.int32)
        # As in a warm-up, whose batch has another number of tokens than the example.
        request = LoRARequest("warm-up", 9, "none")
        model.lora_manager.add_dummy_lora(request, rank=8)
        mapping = LoRAMapping((9,) * 64, (9,) * 64)
        model.lora_manager.set_active_adapters({request}, mapping)
        with torch.no_grad(), set_forward_context(None, model.vllm_config):
            registered_model.record(model, ids, ids.long())
        model.lora_manager.remove_adapter(9)


@pytest.mark.engine
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_recording_with_adapters(serve, tmp_path, device):
    """Two of PEFT's adapters and none in one batch, beside what PEFT computes."""
    ModelRegistry.register_model("Unchanged", lambda config, context: llama())
    llm, module = serve(
        llama, enforce_eager=False, enable_lora=True, max_loras=2, max_lora_rank=8
    )
    assert llm.apply_model(is_compiled) == [device == "gpu"]
    llm.apply_model(record_by_hand)
    # Each linear layer's own product, to which an adapter may add.
    layers, of_layer = SHAPE["num_hidden_layers"], 7
    assert llm.apply_model(products) == [layers * of_layer]
    ways: list[tuple[nn.Module, LoRARequest | None]] = [(copy.deepcopy(module), None)]
    for number, rank in enumerate((8, 3), 1):
        config = LoraConfig(r=rank, target_modules="all-linear", lora_alpha=16)
        adapted = get_peft_model(copy.deepcopy(module), config).eval()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1, generator=generator)
        path = str(tmp_path / f"adapter{number}")
        adapted.save_pretrained(path)
        ways.append((adapted, LoRARequest(f"adapter{number}", number, path)))

    pairs = list(product(PROMPTS, ways))
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in pairs],
        params,
        lora_request=[request for _, (_, request) in pairs],
        use_tqdm=False,
    )
    seen = set()
    for (prompt, (reference, _)), output in zip(pairs, outputs, strict=True):
        [answer] = output.outputs
        ids = torch.tensor([*prompt, *answer.token_ids])
        with torch.no_grad():
            logprobs = reference(ids[None]).logits[0].log_softmax(-1)
        ours = logprobs[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0]
        tokens = zip(answer.logprobs, answer.token_ids, strict=True)
        served = [values[token].logprob for values, token in tokens]
        assert (ours - torch.tensor(served)).abs().max() < 1e-4
        seen.add((tuple(prompt), tuple(answer.token_ids)))
    assert len(seen) > len(PROMPTS)  # the adapters change the answers


@pytest.mark.engine
def test_a_limit_of_the_length_is_not_one_of_a_steps_tokens(serve):
    """As in nanoGPT, which refuses sequences that are longer than its context."""
    ModelRegistry.register_model("Unchanged", lambda config, context: plain())
    options = {"max_model_len": PlainConfig.context, "max_num_seqs": 8}
    llm, module = serve(
        plain, enforce_eager=False, max_num_batched_tokens=1024, **options
    )
    assert llm.apply_model(is_compiled) == [True]
    prompts = [[i, *range(100)] for i in range(8)]  # 808 tokens in the first step
    report = validate(llm, lambda ids: full_forward(module, ids), prompts, max_tokens=8)
    assert report.exit_code == 0, str(report)


@pytest.mark.engine
def test_attention_that_is_written_out(serve):
    ModelRegistry.register_model("Unchanged", lambda config, context: written())
    llm, module = serve(written, enforce_eager=False, max_num_batched_tokens=512)
    assert llm.apply_model(is_compiled) == [True]
    assert_same(llm, module)
    (graph,) = llm.apply_model(lambda model: [*model.adapted._recorded.values()])[0]
    assert "softmax" not in graph.code and "masked_fill" not in graph.code


@pytest.mark.engine
def test_where_nothing_is_recorded_the_limit_is_named(serve):
    ModelRegistry.register_model("Unchanged", lambda config, context: plain())
    refusal = (
        "failed with the 1024 tokens of a step: AssertionError at .*plain_gpt.py:.*, "
        "«assert tokens <= self.config.context».*max_num_batched_tokens=128"
    )
    llm, _ = serve(plain, max_model_len=128, max_num_batched_tokens=1024)
    ids, positions = torch.zeros(1024).long(), torch.arange(1024) % 128
    with pytest.raises(UnservableError, match=refusal):
        llm.apply_model(lambda model: model.adapted.forward(ids, positions))


class DependsOnValues(PlainGPT):
    """Its control flow depends on what the tokens are, as that of some experts does."""

    def forward(self, tokens, targets=None):
        if int(tokens.max()) < 0:
            raise ValueError("no token")
        return super().forward(tokens, targets)


@pytest.mark.engine
@pytest.mark.slow
def test_what_cannot_be_recorded_runs_eagerly(serve, caplog, monkeypatch):
    monkeypatch.setattr(registered_model, "logger", logging.getLogger("test"))
    build = lambda: DependsOnValues(PlainConfig(vocab_size=VOCAB))  # noqa: E731
    ModelRegistry.register_model(
        "Unchanged",
        lambda config, context: build(),
        adapter=Adapter(forward=call_with_labels),
    )
    llm, module = serve(build, enforce_eager=False)
    assert llm.apply_model(is_compiled) == [False]
    assert "runs without torch.compile, which cannot trace it" in caplog.text
    assert_same(llm, module)


def qwen3():
    config = transformers.Qwen3Config(**SHAPE, **TOKENS)
    return transformers.AutoModelForCausalLM.from_config(config)


def gemma3():  # its embedding scales what it looks up
    config = transformers.Gemma3TextConfig(**SHAPE, **TOKENS, sliding_window=16)
    return transformers.AutoModelForCausalLM.from_config(config)


TP = dict(tensor_parallel_size=2)
PP = dict(pipeline_parallel_size=2)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("build", "layout"),
    [
        (llama, TP),
        (qwen3, PP),
        pytest.param(qwen3, TP, marks=pytest.mark.slow),
        pytest.param(llama, PP, marks=pytest.mark.slow),
        pytest.param(gemma3, TP, marks=pytest.mark.slow),
        pytest.param(llama, TP | PP, marks=pytest.mark.slow),
    ],
)
def test_the_plans_of_transformers(serve, build, layout, monkeypatch):
    """Divided and cut as they come; every stage attends to its own layers only."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    factory = lambda config, context: build()  # noqa: E731 - by value
    ModelRegistry.register_model("Unchanged", factory)
    llm, module = serve(build, **layout)
    assert_same(llm, module)
    found = llm.apply_model(heads_of_sites)
    heads = 4 // layout.get("tensor_parallel_size", 1)
    of_stages = [[("model.layers.0.self_attn", heads)]] * 2
    if "pipeline_parallel_size" in layout:
        of_stages[1] = [("model.layers.1.self_attn", heads)]
    else:
        of_stages = [[(f"model.layers.{i}.self_attn", heads) for i in range(2)]]
    assert {tuple(rank) for rank in found} == {tuple(stage) for stage in of_stages}


@pytest.mark.engine
@pytest.mark.parametrize("build", [plain, pytest.param(llama, marks=pytest.mark.slow)])
def test_a_plan_that_nobody_wrote(serve, build, monkeypatch):
    """Checked against the whole module, of which no rank has all weights."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    factory = lambda config, context: build()  # noqa: E731 - by value
    ModelRegistry.register_model("Unchanged", factory, tp_plan="auto")
    llm, module = serve(build, **TP)
    assert_same(llm, module)
    sizes = llm.apply_model(parameters_of)
    assert len(sizes) == 2
    assert all(size < sum(p.numel() for p in module.parameters()) for size in sizes)


@pytest.mark.engine
def test_plain_module_in_another_process(serve):
    """With an adapter, which travels, and with compilation asked for."""
    adapter = Adapter(forward=call_with_labels)
    factory = lambda config, context: plain()  # noqa: E731 - by value
    ModelRegistry.register_model("Unchanged", factory, adapter=adapter)
    llm, module = serve(plain, processes=True, enforce_eager=False)
    assert_same(llm, module)


@pytest.mark.engine
@pytest.mark.slow
def test_stages_need_a_plan(start, tmp_path):
    config = SHAPE | {"architectures": ["Unchanged"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    factory = lambda config, context: plain()  # noqa: E731 - by value
    ModelRegistry.register_model("Unchanged", factory)
    with pytest.raises(Exception, match="no pp_plan"):
        start(model=str(tmp_path), pipeline_parallel_size=2)


def test_what_is_no_adapter_is_refused():
    with pytest.raises(TypeError, match="adapter is a dict; expected an Adapter"):
        ModelRegistry.register_model("Unchanged", lambda c, p: plain(), adapter={})
