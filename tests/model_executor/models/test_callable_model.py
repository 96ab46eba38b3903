# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import copy
import dataclasses
import functools
import gc
import importlib
import json
import os
import pickle
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import (
    CONFIG,
    VOCAB,
    TinyModel,
    build,
    full_sequence_logits,
    greedy,
    trained_model,
)
from torch import nn

from vllm import ModelRegistry, SamplingParams
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.callable_model import (
    CallableModelWrapper,
    _CallableRegisteredModel,
    _NamedRegisteredModel,
)

PROMPTS = [[1, 2, 3], list(range(40)), [7]]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The global registry, restored after the test."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    return ModelRegistry


def generate(llm, prompts=PROMPTS, max_tokens=8):
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(prompts=PROMPTS, max_tokens=8):
    model = trained_model()
    return [greedy(model, prompt, max_tokens) for prompt in prompts]


class Builder:
    def __call__(self, vllm_config, parallel_context):
        return TinyModel()

    def method(self, vllm_config, parallel_context):
        return TinyModel()


def with_prefix(vllm_config, parallel_context, *, prefix):
    assert prefix == ""
    return TinyModel()


CALLABLES = {
    "function": build,
    "lambda": lambda vllm_config, parallel_context: TinyModel(),
    "partial": functools.partial(with_prefix),
    "bound method": Builder().method,
    "callable object": Builder(),
    "string": "tiny_model:build",
}
MORE_CALLABLES = ["function", "partial", "bound method", "callable object"]


class TestRegistration:
    @pytest.mark.parametrize("form", CALLABLES)
    def test_every_form_of_callable_resolves_to_a_wrapper_class(self, form):
        ModelRegistry.register_model("TinyModel", CALLABLES[form])
        model_cls = ModelRegistry.models["TinyModel"].load_model_cls()
        assert issubclass(model_cls, CallableModelWrapper)
        assert model_cls.__name__ == "TinyModel"

    def test_questions_are_answered_without_calling_the_factory(self):
        def factory(vllm_config, parallel_context):
            raise AssertionError("called")

        ModelRegistry.register_model("TinyModel", factory)
        info = ModelRegistry.models["TinyModel"].inspect_model_cls()
        assert info.architecture == "TinyModel"
        assert info.is_text_generation_model
        assert info.supports_pp  # perhaps by a pp_plan, which the module will show
        assert not info.is_pooling_model
        assert not (info.supports_multimodal or info.is_attention_free)

    @pytest.mark.parametrize(
        "name", ["supports_pp", "is_pooling_model", "is_attention_free"]
    )
    def test_declared_capability(self, name):
        ModelRegistry.register_model("TinyModel", build, **{name: True})
        assert getattr(ModelRegistry.models["TinyModel"].inspect_model_cls(), name)

    def test_return_annotation_declares_capabilities(self):
        class Annotated(TinyModel):
            supports_pp = True
            is_attention_free = True

            def make_empty_intermediate_tensors(self, *args):
                raise NotImplementedError

        def factory(vllm_config, parallel_context) -> Annotated:
            return Annotated()

        ModelRegistry.register_model("TinyModel", factory)
        info = ModelRegistry.models["TinyModel"].inspect_model_cls()
        assert info.supports_pp and info.is_attention_free
        ModelRegistry.register_model("TinyModel", factory, is_attention_free=False)
        info = ModelRegistry.models["TinyModel"].inspect_model_cls()
        assert info.supports_pp and not info.is_attention_free

    def test_a_pooling_model_does_not_generate_text(self):
        ModelRegistry.register_model("TinyModel", build, is_pooling_model=True)
        info = ModelRegistry.models["TinyModel"].inspect_model_cls()
        assert info.is_pooling_model and not info.is_text_generation_model

    def test_registering_again_replaces(self):
        ModelRegistry.register_model("TinyModel", build)
        first = ModelRegistry.models["TinyModel"]
        ModelRegistry.register_model("TinyModel", CALLABLES["lambda"])
        assert ModelRegistry.models["TinyModel"] is not first

    @pytest.mark.parametrize(
        "bad, message",
        [
            (7, "expected a model class, a callable or a string 'module:name', got a"),
            (lambda: None, "too many positional arguments"),
            (lambda vllm_config: None, "too many positional arguments"),
            (lambda a, b, c: None, "missing a required argument: 'c'"),
            (lambda *, vllm_config, parallel_context: None, "positional arguments"),
            (nn.Linear(2, 2), "Register `lambda vllm_config, parallel_context: mod"),
            ("no colon", "<module>:<class>"),
        ],
    )
    def test_what_cannot_be_called_is_refused_at_registration(self, bad, message):
        with pytest.raises((TypeError, ValueError), match=message):
            ModelRegistry.register_model("TinyModel", bad)
        assert "TinyModel" not in ModelRegistry.models

    def test_misspelt_capability(self):
        with pytest.raises(TypeError, match="did you mean supports_pp"):
            ModelRegistry.register_model("TinyModel", build, support_pp=True)

    def test_a_class_declares_its_own_capabilities(self):
        with pytest.raises(TypeError, match="as class attributes"):
            ModelRegistry.register_model("TinyModel", TinyModel, supports_pp=True)


class TestTransport:
    @pytest.mark.parametrize("form", CALLABLES)
    def test_pickle(self, form):
        model = _CallableRegisteredModel("TinyModel", CALLABLES[form], {})
        copied = pickle.loads(pickle.dumps(model))
        assert copied.architecture == "TinyModel"
        assert copied.load_model_cls().__name__ == "TinyModel"

    def test_a_closure_travels_with_what_it_holds(self):
        width = 5
        model = _CallableRegisteredModel("M", lambda c, p: nn.Linear(width, width), {})
        copied = pickle.loads(pickle.dumps(model))
        assert copied.factory(None, None).in_features == 5

    def test_what_cannot_be_pickled_is_named(self):
        settings = {"sizes": [1, 2], "guard": threading.Lock()}
        model = _CallableRegisteredModel("M", lambda c, p: settings["sizes"], {})
        with pytest.raises(TypeError) as error:
            pickle.dumps(model)
        assert "settings.['guard'] (a lock)" in str(error.value)
        assert 'register the callable as "module:name"' in str(error.value)

    def test_what_cannot_be_imported_there_is_said_when_the_model_is_built(
        self, monkeypatch, tmp_path
    ):
        (tmp_path / "only_here.py").write_text("def build(c, p): ...")
        monkeypatch.syspath_prepend(tmp_path)
        factory = importlib.import_module("only_here").build
        pickled = pickle.dumps(_CallableRegisteredModel("M", factory, {}))
        monkeypatch.undo()
        monkeypatch.delitem(sys.modules, "only_here")
        copied = pickle.loads(pickle.dumps(pickle.loads(pickled)))
        with pytest.raises(ImportError, match="No module named 'only_here'. What it"):
            copied.factory(None, None)

    def test_what_cannot_be_imported_there_keeps_its_capabilities_and_traceback(
        self, monkeypatch, tmp_path
    ):
        (tmp_path / "broken_there.py").write_text("def build(c, p): ...")
        monkeypatch.syspath_prepend(tmp_path)
        factory = importlib.import_module("broken_there").build
        model = _CallableRegisteredModel("M", factory, {"is_attention_free": True})
        pickled = pickle.dumps(model)
        monkeypatch.delitem(sys.modules, "broken_there")
        (tmp_path / "broken_there.py").write_text("1 / 0")
        importlib.invalidate_caches()
        copied = pickle.loads(pickle.dumps(pickle.loads(pickled)))
        assert copied.capabilities == {"is_attention_free": True}
        with pytest.raises(ImportError, match="division by zero") as error:
            copied.factory(None, None)
        assert "broken_there.py" in error.value.__notes__[0]

    def test_what_travels_with_the_config(self, model_dir):
        def config_of(*architectures):
            return ModelConfig(
                str(model_dir),
                hf_overrides={"architectures": list(architectures)},
                skip_tokenizer_init=True,
            )

        ModelRegistry.register_model("LambdaModel", lambda c, p: TinyModel())
        ModelRegistry.register_model("LazyModel", "tiny_model:build")
        config = config_of("LambdaModel", "LazyModel", "LlamaForCausalLM")
        kept = config.registered_callables
        assert kept.keys() == {"LambdaModel", "LazyModel"}
        # A later registration is another config's, and a worker has none at all.
        ModelRegistry.register_model("LambdaModel", build)
        del ModelRegistry.models["LazyModel"]
        for same in (
            config,
            copy.copy(config),
            copy.deepcopy(config),
            dataclasses.replace(config, mm_tensor_ipc="direct_rpc"),
            pickle.loads(pickle.dumps(config)),
        ):
            models = same.registry.models
            assert models["LazyModel"] == kept["LazyModel"]
            assert models["LambdaModel"].factory.__name__ == "<lambda>"
        assert config.compute_hash() == copy.deepcopy(config).compute_hash()

    @pytest.mark.parametrize("form", ["string", "class", "lambda"])
    def test_an_entry_in_the_place_of_vllms_own_travels(self, model_dir, form):
        class Local(TinyModel):
            """A class that no module has, with vLLM's interface."""

            def __init__(self, *, vllm_config, prefix=""):
                super().__init__()

            def embed_input_ids(self, input_ids):
                return self.embedding(input_ids)

            def compute_logits(self, hidden_states):
                return self.lm_head(hidden_states)

        entry = {"class": Local, **CALLABLES}[form]
        own = ModelRegistry.models["LlamaForCausalLM"]
        ModelRegistry.register_model("LlamaForCausalLM", entry)
        config = ModelConfig(
            str(model_dir),
            hf_overrides={"architectures": ["LlamaForCausalLM"]},
            skip_tokenizer_init=True,
        )
        ModelRegistry.models["LlamaForCausalLM"] = own  # as in a spawned worker
        model_cls = get_model_cls(pickle.loads(pickle.dumps(config)))
        expected_name = "Local" if form == "class" else "LlamaForCausalLM"
        assert model_cls.__name__ == expected_name
        assert model_cls is not own.load_model_cls()

    def test_vllms_own_entries_do_not_travel(self, model_dir):
        llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        (model_dir / "config.json").write_text(json.dumps(CONFIG | llama))
        config = ModelConfig(str(model_dir), skip_tokenizer_init=True)
        assert config.registered_callables == {}

    def test_what_a_string_names_is_asked_anew_after_an_edit(
        self, monkeypatch, tmp_path
    ):
        (tmp_path / "declared.py").write_text(
            "from torch import nn\nclass M(nn.Module):\n    is_pooling_model = True\n"
        )
        (tmp_path / "named.py").write_text(
            "import declared\ndef build(c, p) -> declared.M: ...\n"
            "def other(c, p): ...\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
        model = _NamedRegisteredModel("named", "build", "First")
        other = _NamedRegisteredModel("named", "other", "Second")
        assert model.inspect_model_cls().is_pooling_model
        assert not other.inspect_model_cls().is_pooling_model
        assert "named" not in sys.modules  # another process asked it
        (tmp_path / "declared.py").write_text(
            "from torch import nn\nclass M(nn.Module):\n    is_attention_free = True\n"
        )
        info = model.inspect_model_cls()
        assert info.is_attention_free and not info.is_pooling_model
        assert info.architecture == "First"

    def test_what_was_replaced_is_not_kept(self, model_dir):
        def resolve(factory):
            ModelRegistry.register_model("TinyModel", factory)
            return get_model_cls(ModelConfig(str(model_dir), skip_tokenizer_init=True))

        weights = torch.ones(2)
        kept = weakref.ref(weights)
        resolve(lambda c, p, weights=weights: nn.Linear(weights.numel(), 2))
        del weights
        assert kept() is not None
        resolve(build)
        gc.collect()
        assert kept() is None

    def test_deepcopy_of_a_config_does_not_need_a_pickle(self):
        guard = threading.Lock()
        model = _CallableRegisteredModel("M", lambda c, p: guard, {})
        assert copy.deepcopy({"carried": model})["carried"] is model


def slow(case: str):
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.engine
class TestServing:
    @pytest.mark.parametrize(
        "form",
        ["lambda", "string", *map(slow, MORE_CALLABLES)],
    )
    def test_every_form_of_callable_serves(self, start, form):
        ModelRegistry.register_model("TinyModel", CALLABLES[form])
        assert generate(start()) == expected()

    def test_names_are_the_modules_own(self, start):
        ModelRegistry.register_model("TinyModel", build)
        llm = start()
        names = llm.apply_model(lambda model: list(model.state_dict()))[0]
        assert names == list(TinyModel().state_dict())
        names = llm.apply_model(lambda m: [name for name, _ in m.named_parameters()])[0]
        assert names == [name for name, _ in TinyModel().named_parameters()]

    def test_registering_again_serves_the_new_model(self, start, model_dir):
        ModelRegistry.register_model("TinyModel", build)
        assert generate(start()) == expected()

        class Negated(TinyModel):
            def compute_logits(self, hidden_states):
                assert not self.training  # nor when it is tried
                return -self.lm_head(hidden_states)

        ModelRegistry.register_model("TinyModel", lambda c, p: Negated())
        logits = full_sequence_logits(trained_model(), PROMPTS[0])
        assert generate(start(), PROMPTS[:1], 1) == [[int(logits[-1].argmin())]]

    def test_a_string_reaches_spawned_workers(self, start):
        ModelRegistry.register_model("TinyModel", "tiny_model:build")
        llm = start(processes=True)
        assert generate(llm) == expected()

    def test_a_pooling_model_needs_no_output_head(
        self, start, model_dir_with_tokenizer
    ):
        from vllm.config import PoolerConfig
        from vllm.model_executor.layers.pooler import DispatchPooler

        class Embedder(TinyModel):
            def __init__(self, vllm_config):
                super().__init__()
                pooler_config = vllm_config.model_config.pooler_config
                self.pooler = DispatchPooler.for_embedding(pooler_config)
                del self.lm_head

            def load_weights(self, weights):
                self.load_state_dict(
                    {k: v for k, v in weights if k != "lm_head.weight"}
                )

        ModelRegistry.register_model(
            "TinyModel", lambda c, p: Embedder(c), is_pooling_model=True
        )
        llm = start(
            runner="pooling",
            skip_tokenizer_init=False,
            pooler_config=PoolerConfig(seq_pooling_type="LAST", use_activation=False),
        )
        outputs = llm.embed(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False
        )
        model = trained_model()
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            with torch.no_grad():
                hidden = model(torch.tensor(prompt), torch.arange(len(prompt)))[-1]
            embedding = torch.tensor(output.outputs.embedding)
            assert torch.allclose(embedding, hidden, rtol=1e-4, atol=1e-4)

    def test_unpicklable_closure_under_spawn_fails_in_the_caller(self, start):
        guard = threading.Lock()
        ModelRegistry.register_model("TinyModel", lambda c, p: (guard, TinyModel())[1])
        with pytest.raises(TypeError, match="because guard .a lock. cannot be pickled"):
            start(processes=True)


def no_forward(vllm_config, parallel_context):
    model = nn.Module()
    model.lm_head = nn.Linear(8, VOCAB)
    return model


def no_logits(vllm_config, parallel_context):
    model = TinyModel()
    model.vocabulary = model.lm_head
    del model.lm_head
    return model


class Batched(TinyModel):
    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions)[None]


class Overflowing(TinyModel):
    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states) * torch.inf


class NarrowHead(TinyModel):
    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)[None]


class OneArgument(TinyModel):
    def forward(self, input_ids):
        return self.embedding(input_ids)


BAD_FACTORIES = {
    "raises": (lambda c, p: 1 / 0, "division by zero"),
    "None": (lambda c, p: None, "returned None; expected a torch.nn.Module"),
    "class": (lambda c, p: TinyModel, "returned the class TinyModel; expected"),
    "tensor": (lambda c, p: torch.ones(2, 3), "returned a tensor of shape .2, 3.;"),
    "no forward": (no_forward, "has no forward. vLLM calls forward.self, input_ids"),
    "forward of one": (lambda c, p: OneArgument(), "cannot be called with token ids"),
    "no logits": (no_logits, "no way from hidden states to logits. Give it compute_"),
    "batch axis": (lambda c, p: Batched(), "forward returned a tensor of shape .1, 8,"),
    "NaN": (lambda c, p: Overflowing(), "logits are not finite at warm-up"),
    "logits' shape": (lambda c, p: NarrowHead(), "logits have shape .1, 8, 128.;"),
}


@pytest.mark.engine
class TestBadInput:
    @pytest.mark.parametrize("case", BAD_FACTORIES)
    def test_bad_factory(self, start, case):
        factory, message = BAD_FACTORIES[case]
        ModelRegistry.register_model("TinyModel", factory)
        with pytest.raises(Exception, match=message):
            start()

    def test_root_cause_comes_first_from_worker_processes(self, start):
        ModelRegistry.register_model("TinyModel", BAD_FACTORIES["None"][0])
        with pytest.raises(RuntimeError, match="^TypeError: TinyModel: the registered"):
            start(processes=True, tensor_parallel_size=2)

    def test_heads_that_tp_does_not_divide(self, start):
        ModelRegistry.register_model("TinyModel", build)
        with pytest.raises(ValueError, match="attention heads .2. must be divisible"):
            start(tensor_parallel_size=3)

    def test_pipeline_parallelism_undeclared(self, start):
        ModelRegistry.register_model("TinyModel", build)
        with pytest.raises(RuntimeError, match="no pp_plan.*with supports_pp=True"):
            start(pipeline_parallel_size=2)

    def test_pipeline_parallelism_declined(self, start):
        ModelRegistry.register_model("TinyModel", build, supports_pp=False)
        with pytest.raises(NotImplementedError, match="with `supports_pp=True`"):
            start(pipeline_parallel_size=2)


class TestBadWeights:
    """Errors in the checkpoint, through the whole engine."""

    pytestmark = pytest.mark.engine

    @pytest.fixture(autouse=True)
    def registered(self):
        ModelRegistry.register_model("TinyModel", build)

    def start_fails(self, start, message):
        with pytest.raises(ValueError, match=message):
            start()

    def test_missing_surplus_and_misshaped(self, start, model_dir):
        weights = trained_model().state_dict()
        weights["lm_head.bias"] = torch.ones(VOCAB)
        weights["layers.0.norm.bias"] = torch.ones(3)
        del weights["layers.1.norm.weight"]
        save_file(weights, model_dir / "model.safetensors")
        self.start_fails(
            start,
            "does not fit TinyModel: 1 missing: layers.1.norm.weight; 1 surplus: "
            r"lm_head.bias; 1 mis-shaped: layers.0.norm.bias \[3\], expected \[64\]",
        )

    @pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
    def test_truncated(self, start, model_dir, name):
        if name.endswith(".pt"):
            (model_dir / "model.safetensors").unlink()
            torch.save(trained_model().state_dict(), model_dir / name)
        path = model_dir / name
        path.write_bytes(path.read_bytes()[:-1000])
        self.start_fails(start, "cannot be read: .* truncated one has to be copied")

    def test_a_pickle_that_wants_code(self, start, model_dir, tmp_path_factory):
        (model_dir / "model.safetensors").unlink()
        trap = tmp_path_factory.mktemp("trap") / "sprung"
        torch.save({"lm_head.weight": RunsCode(str(trap))}, model_dir / "model.pt")
        self.start_fails(start, "a pickle that is not plain tensors, and is not run")
        assert not trap.exists()

    def test_pt_serves(self, start, model_dir):
        (model_dir / "model.safetensors").unlink()
        torch.save(trained_model().state_dict(), model_dir / "model.pt")
        assert generate(start()) == expected()

    def test_the_modules_own_load_weights_wins(self, start, model_dir):
        class Renaming(TinyModel):
            def load_weights(self, weights):
                self.load_state_dict(
                    {name.removeprefix("model."): tensor for name, tensor in weights}
                )

        prefixed = {f"model.{k}": v for k, v in trained_model().state_dict().items()}
        save_file(prefixed, model_dir / "model.safetensors")
        ModelRegistry.register_model("TinyModel", lambda c, p: Renaming())
        assert generate(start()) == expected()


class RunsCode:
    """Its unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
