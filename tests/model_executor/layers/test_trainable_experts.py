# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A mixture of experts: values, equal bits in every layout, and its routing.

Engines with it are compared by tests/model_executor/models/test_layout_invariance.py.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from vllm.model_executor.layers.trainable_experts import (
    TrainableExperts,
    recorded_routing,
    replayed_routing,
    top_experts,
)
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.batch_invariance import batch_invariant

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 64, 128, 8, 3, 37
DTYPES = [torch.float32, torch.bfloat16]


def whole(dtype=torch.float32) -> TrainableExperts:
    layer = TrainableExperts(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2, generator=generator)
        # Experts 2 and 5 have equal scores for every token.
        layer.router.weight[5] = layer.router.weight[2]
    return layer.to(dtype)


def tokens(dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)


def run(layer: TrainableExperts, dtype) -> dict[str, torch.Tensor]:
    x = tokens(dtype).requires_grad_()
    with torch.no_grad(), recorded_routing(layer) as routing:
        out = layer(x)
    trained = layer(x)
    trained.float().square().mean().backward()
    gradients = {"x": x.grad, "router": layer.router.weight.grad}
    return {
        "out": out,
        "out with gradients": trained.detach(),
        "routing": routing[0],
        **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
    }


def test_values() -> None:
    """Against one sum over all experts, in float64."""
    layer = whole().double()
    x = tokens().double()
    probabilities = F.linear(x, layer.router.weight).softmax(-1)
    weights, chosen = probabilities.topk(TOP_K)
    weights = weights / weights.sum(1, keepdim=True)
    dense = torch.zeros(TOKENS, EXPERTS).double().scatter(1, chosen, weights)
    expected = torch.zeros(TOKENS, HIDDEN).double()
    # topk may choose the other of the two equal experts
    dense[:, [2, 5]] = dense[:, [2, 5]].sort(1, descending=True).values
    for index, expert in layer.experts.items():
        inside = F.silu(expert["gate_proj"](x)) * expert["up_proj"](x)
        expected += dense[:, int(index), None] * expert["down_proj"](inside)
    both = (dense[:, 2] > 0) & (dense[:, 5] > 0)
    assert both.any() and not both.all()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer(x.view(1, TOKENS, HIDDEN)).shape == (1, TOKENS, HIDDEN)


def test_equal_scores_go_to_the_lower_index() -> None:
    scores = torch.zeros(2, 40)
    scores[1, 7:30] = 1.0
    assert top_experts(scores, 3).tolist() == [[0, 1, 2], [7, 8, 9]]
    with recorded_routing(layer := whole()) as routing:
        layer(tokens())
    chosen = routing[0]
    has_5, has_2 = (chosen == 5).any(1), (chosen == 2).any(1)
    assert has_2.any() and not (has_5 & ~has_2).any()


def run_rank(context: ParallelContext) -> None:
    folder = Path.cwd()
    weights = torch.load(folder / "weights.pt", weights_only=True)
    found = {}
    for dtype in DTYPES:
        with batch_invariant():
            layer = TrainableExperts(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, context).to(
                dtype
            )
            load_full_checkpoint(layer, weights.items(), context)
            found[str(dtype)] = run(layer, dtype)
    name = f"{context.tensor_parallel_size}-{context.expert_parallel_size}"
    torch.save(found, folder / f"{name}-{context.tensor_parallel_rank}.pt")


@pytest.mark.parametrize(
    "size", [2, pytest.param(4, marks=pytest.mark.slow)], ids="TP={}".format
)
@pytest.mark.parametrize("spread", [False, True], ids=["split", "spread"])
def test_equal_bits_in_every_layout(size, spread, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(whole().state_dict(), tmp_path / "weights.pt")
    # vLLM makes the group of a mixture of experts only.
    run_ranks(run_rank, tmp_path, size, enable_expert_parallel=spread)
    for dtype in DTYPES:
        with batch_invariant():
            expected = run(whole(dtype), dtype)
        assert torch.equal(expected["out"], expected["out with gradients"])
        for rank in range(size):
            file = tmp_path / f"{size}-{size if spread else 1}-{rank}.pt"
            found = torch.load(file, weights_only=True)[str(dtype)]
            for name, tensor in found.items():
                if "gradient of" not in name:
                    assert torch.equal(tensor, expected[name]), (dtype, rank, name)
                    continue
                error = (tensor.double() - expected[name].double()).norm()
                limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
                assert error <= limit * expected[name].double().norm(), (dtype, name)


def test_a_trainer_that_rounds_otherwise_replays_the_routing() -> None:
    engine, trainer = whole(), whole()
    with torch.no_grad():
        trainer.router.weight[2] -= 1e-3  # now expert 5 comes before expert 2
    x = tokens()
    with recorded_routing(engine) as routing, torch.no_grad():
        expected = engine(x)
    far = (trainer(x) - expected).abs().max()
    with replayed_routing(trainer, torch.stack([routing[0]], 1).to(torch.uint8)):
        out = trainer(x)
    assert (out - expected).abs().max() < 0.1 * far
    out.sum().backward()
    assert trainer.router.weight.grad.abs().max() > 0
    again = trainer(x)  # replaying ends with the block
    assert (again - expected).abs().max() == far


def test_faults_of_a_replay() -> None:
    layer = whole()
    wrong = torch.zeros(TOKENS + 1, 1, TOP_K, dtype=torch.uint8)
    message = rf"the shape \[{TOKENS + 1}, {TOP_K}\] for layer 0; expected \[{TOKENS}"
    with replayed_routing(layer, wrong), pytest.raises(ValueError, match=message):
        layer(tokens())
    with (
        pytest.raises(ValueError, match="expected .tokens, layers, top_k."),
        replayed_routing(layer, wrong[:, 0]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="Linear has no layer whose routing"),
        recorded_routing(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "128 features of an expert cannot be divided"),
        (
            {"tensor_parallel_size": 3, "expert_parallel_size": 3},
            "8 experts cannot be divided by 3",
        ),
        (
            {"expert_parallel_size": 2, "data_parallel_size": 2},
            "span data-parallel ranks",
        ),
    ],
)
def test_what_does_not_divide(options, message) -> None:
    context = ParallelContext(**options)
    with pytest.raises(ValueError, match=message):
        TrainableExperts(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, context)


def test_an_engine_that_returns_routing_finds_the_layer() -> None:
    """By the protocol of vLLM's capturer, which on a CPU no model runner uses."""
    capturer = pytest.importorskip(
        "vllm.model_executor.layers.fused_moe.routed_experts_capturer"
    )
    if not hasattr(capturer, "RoutedExpertsCaptureSource"):
        pytest.skip("this release finds only layers of its own")
    layers = nn.ModuleList(
        TrainableExperts(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, layer_id=index)
        for index in range(2)
    )
    captured = {}

    class Capturer:
        def capture(self, layer_id, chosen):
            captured[layer_id] = chosen

    capturer.bind_routed_experts_capturer(layers, Capturer())
    for layer in layers:
        layer(tokens())
    assert captured.keys() == {0, 1}
    assert all(chosen.shape == (TOKENS, TOP_K) for chosen in captured.values())
