# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The batch-invariant mode: one model has the same bits in every parallel layout.

Modules are compared here, over gloo on a CPU or over NCCL on GPUs; engines in
tests/model_executor/models/test_layout_invariance.py.
"""

from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import parallel_transformer
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layout_models import (
    CONFIG,
    PlannedStage,
    build_dtensor,
    build_megatron,
    build_parallel,
    build_plain,
    build_planned,
)
from ranks import run_ranks

from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.trainable_attention import packed_sequences
from vllm.model_executor.layers.tree_linear.other_layers import sum_in_tree
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.models.callable_model.logits import logits_function
from vllm.model_executor.models.plans import apply_plans
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.training.batch_invariance import batch_invariant
from vllm.training.initial_values import initialize_parameters
from vllm.utils.torch_utils import set_default_torch_dtype

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 37, 20]
KINDS = {
    "vllm layers": build_parallel,
    "dtensor": build_dtensor,
    "megatron": build_megatron,
    "plan": build_planned,
}
# What differs from CONFIG: at TP=2 and 4 ranks share KV heads where there is one.
SHAPES = {
    "base": {},
    "heads of 64, QK-norm": {"head_dim": 64, "qk_norm": True, "num_key_value_heads": 4},
    "heads of 96, tied": {"head_dim": 96, "tie_word_embeddings": True},
    "heads of 128, shared, no biases": {
        "head_dim": 128,
        "num_key_value_heads": 1,
        "attention_bias": False,
    },
    "uneven vocabulary, tied": {"vocab_size": 99, "tie_word_embeddings": True},
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
# What a kind of layers cannot divide.
NOT_DIVIDED = {
    ("plan", "heads of 128, shared, no biases"),
    ("megatron", "uneven vocabulary, tied"),
}


def config_of(shape: str) -> dict:
    return CONFIG | (SMALL | SHAPES[shape] if SHAPES[shape] else {})


def random_weights(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, device="cpu") * 0.3
        for name, shape in shapes.items()
    }


def whole_model(shape: str, dtype: torch.dtype, weights=None):
    with set_default_torch_dtype(dtype):
        model = build_plain(SimpleNamespace(**config_of(shape)))
    if weights is None:
        weights = random_weights({n: x.shape for n, x in model.state_dict().items()})
    model.load_state_dict(weights)
    return model


def vllm_config(shape: str):
    hf_config = SimpleNamespace(**config_of(shape))
    model_config = SimpleNamespace(
        hf_config=hf_config, get_hidden_size=lambda: hf_config.hidden_size
    )
    return SimpleNamespace(model_config=model_config)


def tokens(vocab: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    ids = torch.randint(vocab, (sum(LENGTHS),), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def run(model, logits_of, vocab: int) -> dict[str, torch.Tensor]:
    """Logits `[tokens, vocab]`, with and without gradients, and some gradients."""
    ids = tokens(vocab)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0, dtype=torch.int32), (1, 0))

    def logits():
        with packed_sequences(offsets):
            return logits_of(model(ids, positions))[..., :vocab]

    with torch.no_grad():
        result = {"logits": logits()}
    trained = logits()
    result["logits with gradients"] = trained.detach()
    trained.float().log_softmax(-1)[:, 0].mean().backward()
    for name, parameter in model.named_parameters():
        if "norm" in name or name == "positions.weight":  # whole on every rank
            result[name] = (
                parameter.grad.full_tensor()
                if (hasattr(parameter.grad, "full_tensor"))
                else parameter.grad
            )
    return {name: x.cpu() for name, x in result.items()}


def run_kinds(context) -> None:
    folder, size = Path.cwd(), context.tensor_parallel_size
    weights = torch.load(folder / "weights.pt", weights_only=True)
    found = {}
    for shape, dtype, kind in product(SHAPES, DTYPES, KINDS):
        if kind == "megatron":
            pytest.importorskip("megatron.core")
        if size > 1 and (kind, shape) in NOT_DIVIDED:
            continue
        config = vllm_config(shape)
        vocab = config.model_config.hf_config.vocab_size
        with set_default_torch_dtype(dtype), batch_invariant():
            model = KINDS[kind](config, context).to(dtype)
            apply_plans(model, config, context)
            sum_in_tree(model)
            load_full_checkpoint(model, weights[shape].items(), context)
            model.requires_grad_(True)
            logits_of = logits_function("", model, vocab, size)
            found[shape, kind, dtype] = run(model, logits_of, vocab)
    if context.tensor_parallel_rank == 0:
        torch.save(found, folder / f"tp{size}.pt")


def assert_gradients_close(case, found, expected, dtype) -> None:
    """To the rounding of the dtype, over the whole tensor."""
    for name, gradient in expected.items():
        if "logits" not in name:
            error = (found[name].double() - gradient.double()).norm()
            limit = 4e-2 if dtype == torch.bfloat16 else 1e-5
            assert error <= limit * gradient.double().norm(), (case, name, float(error))


@pytest.mark.parametrize(
    "sizes", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str
)
def test_every_kind_of_layers(sizes, tmp_path, monkeypatch) -> None:
    """Over as many ranks, and for a whole module of plain layers.

    Megatron adds biases to what it has rounded, so that in bfloat16 its layers have
    bits of their own; these are the same in every layout, too.
    """
    monkeypatch.chdir(tmp_path)
    weights = {
        shape: whole_model(shape, torch.float32).state_dict() for shape in SHAPES
    }
    torch.save(weights, tmp_path / "weights.pt")
    layouts = {}
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        run_ranks(run_kinds, tmp_path / str(size), size)
        layouts[size] = torch.load(tmp_path / f"tp{size}.pt", weights_only=False)
    for shape, dtype in product(SHAPES, DTYPES):
        model = whole_model(shape, dtype, weights[shape])
        sum_as_divided(model, PlannedStage.tp_plan)
        with batch_invariant():
            plain = run(model, model.lm_head, config_of(shape)["vocab_size"])
        assert torch.equal(plain["logits"], plain["logits with gradients"])
        for kind in KINDS:
            own = kind == "megatron" and dtype == torch.bfloat16
            expected = layouts[1][shape, kind, dtype] if own else plain
            for size, found in layouts.items():
                if size > 1 and (kind, shape) in NOT_DIVIDED:
                    continue
                case = (shape, kind, dtype, size)
                result = found[case[:3]]
                for name in ("logits", "logits with gradients"):
                    assert torch.equal(result[name], expected["logits"]), (case, name)
                # plans divide models to serve them
                if shape == "base" and (kind != "plan" or size == 1):
                    assert_gradients_close(case, result, plain, dtype)


def fill(name: str, whole: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
    whole.copy_(weights[name])


def run_transformer(context) -> None:
    # On a CPU PyTorch computes silu by other code in the last elements of rows that are
    # no multiple of 32 long.
    parallel_transformer.INTERMEDIATE = 128
    size = context.tensor_parallel_size
    found = {}
    for tied in (False, True):
        weights = parallel_transformer.whole_weights(tied)
        for dtype in DTYPES:
            with set_default_torch_dtype(dtype), batch_invariant():
                model = parallel_transformer.ParallelTransformer(context, tied)
                initialize_parameters(model, partial(fill, weights=weights))
                model.requires_grad_(True)
                vocab = parallel_transformer.VOCAB
                logits_of = logits_function("", model, vocab, size)
                found[f"{tied} {dtype}"] = run(model, logits_of, vocab)
    of_all_ranks = [None] * size
    dist.all_gather_object(of_all_ranks, found, get_tp_group().cpu_group)
    for other in of_all_ranks:
        for case, tensors in found.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, other[case][name]), (case, name)
    if context.tensor_parallel_rank == 0:
        torch.save(found, Path.cwd() / f"tp{size}.pt")


def test_shared_heads_biases_and_an_uneven_vocabulary(tmp_path, monkeypatch) -> None:
    """vLLM's layers: at TP=4 two ranks have one KV head, and one has no tokens."""
    monkeypatch.chdir(tmp_path)
    layouts = {}
    for size in (1, 2, 4):
        (tmp_path / str(size)).mkdir()
        run_ranks(run_transformer, tmp_path / str(size), size)
        layouts[size] = torch.load(tmp_path / f"tp{size}.pt", weights_only=True)
    for size, found in layouts.items():
        for case, result in found.items():
            expected = layouts[1][case]
            for name in ("logits", "logits with gradients"):
                assert torch.equal(result[name], expected["logits"]), (case, size, name)
            dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
            assert_gradients_close((case, size), result, expected, dtype)
