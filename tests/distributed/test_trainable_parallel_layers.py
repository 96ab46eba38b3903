# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's parallel layers on several ranks, against plain PyTorch on one device."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from parallel_transformer import (
    CONFIG,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    VOCAB,
    ParallelTransformer,
    build,
    reference_hidden,
    whole_weights,
)
from ranks import run_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from vllm.distributed import (
    differentiable_collectives,
    get_tp_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_copy,
    tensor_model_parallel_reduce_scatter,
)
from vllm.model_executor.layers import trainable_parallel_layers
from vllm.model_executor.layers.linear import (
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.training.checkpoints import TrainingState
from vllm.training.clipping import clip_grad_norm_
from vllm.training.initial_values import initialize_parameters
from vllm.training.loss import (
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
    vocab_parallel_token_log_probs,
)

STEPS, STEPS_AFTER = 50, 3
MAX_NORM = 1.0


def batch() -> torch.Tensor:
    """Token ids `[batch, seq + 1]`."""
    generator = torch.Generator("cpu").manual_seed(1)
    ids = torch.randint(VOCAB, (4, 17), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def parallel_model(context, weights=None, tied=False) -> ParallelTransformer:
    weights = weights or whole_weights(tied)
    model = ParallelTransformer(context, tied)
    initialize_parameters(model, lambda name, whole: whole.copy_(weights[name]))
    return model.requires_grad_(True)


def parallel_loss(model: ParallelTransformer) -> torch.Tensor:
    ids = batch()
    hidden_states = model(ids[:, :-1], torch.arange(ids.shape[1] - 1))
    logits = vocab_parallel_logits(model.lm_head, hidden_states)
    return vocab_parallel_cross_entropy(logits, ids[:, 1:], model.lm_head)


def reference_logits(weights, ids: torch.Tensor) -> torch.Tensor:
    head = weights.get("lm_head.weight", weights["embedding.weight"])
    return F.linear(reference_hidden(weights, ids), head, weights["lm_head.bias"])


def reference_loss(weights) -> torch.Tensor:
    ids = batch()
    logits = reference_logits(weights, ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def adamw(parameters) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3)


def parallel_steps(model, optimizer, steps: int) -> list[float]:
    """Their losses."""
    losses = []
    for _ in range(steps):
        loss = parallel_loss(model)
        loss.backward()
        clip_grad_norm_(model, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def reference_steps(steps: int) -> list[float]:
    weights = {n: w.requires_grad_(True) for n, w in whole_weights().items()}
    optimizer = adamw(weights.values())
    losses = []
    for _ in range(steps):
        loss = reference_loss(weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- What every number of ranks has to do ------------------------------------------


def check_gradients(context, tied: bool) -> None:
    weights = {n: w.requires_grad_(True) for n, w in whole_weights(tied).items()}
    expected_loss = reference_loss(weights)
    expected_loss.backward()
    # Every rank's part of the gradients of one device.
    expected = parallel_model(context, {n: w.grad for n, w in weights.items()}, tied)

    model = parallel_model(context, tied=tied)
    loss = parallel_loss(model)
    loss.backward()
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    for (name, parameter), wanted in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        difference = (parameter.grad - wanted).abs().max().item()
        assert difference <= 1e-5, f"{name}: {difference}"

    norm = clip_grad_norm_(model, MAX_NORM)
    parameters = list(weights.values())
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)


def check_replicas_stay_equal(context, model: ParallelTransformer) -> None:
    """After training: what all ranks hold has the same bits on each of them."""
    replicated = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "norm" in name
        or ".mix." in name
        or name == "positions.weight"
        # biases that only rank 0 adds
        or name.endswith(("out.bias", "narrow.bias"))
    }
    assert len(replicated) == 2 + 6 * 2
    for name, parameter in replicated.items():
        for other in gathered(parameter):
            assert torch.equal(parameter, other), name
    replicas = model.layers[0].qkv.num_kv_head_replicas
    assert replicas == max(1, context.tensor_parallel_size // KV_HEADS)
    first = context.tensor_parallel_rank // replicas * replicas
    for layer in model.layers:
        # [q | k | v, ...]
        queries = HEADS // context.tensor_parallel_size * HEAD_DIM
        for parameter in (layer.qkv.weight, layer.qkv.bias):
            shares = gathered(parameter[queries:])
            for other in shares[first : first + replicas]:
                assert torch.equal(parameter[queries:], other)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    tensor = tensor.detach().contiguous()
    group = get_tp_group()
    tensors = [torch.empty_like(tensor) for _ in range(group.world_size)]
    dist.all_gather(tensors, tensor, group=group.device_group)
    return tensors


def check_collectives(context) -> None:
    """A replicated value into sharded work and back, both ways."""
    size, rank = context.tensor_parallel_size, context.tensor_parallel_rank
    for dim in (0, -1):
        x = torch.arange(32.0).view(8, 4).requires_grad_(True)
        scale = torch.arange(32.0).view(8, 4) + 1
        mine = scale.chunk(size, dim)[rank]

        joined = tensor_model_parallel_all_gather(
            tensor_model_parallel_copy(x).chunk(size, dim)[rank] * mine, dim
        )
        assert torch.equal(joined, x * scale)
        joined.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x * scale**2)

        x.grad = None
        part = tensor_model_parallel_reduce_scatter(
            tensor_model_parallel_copy(x) * (rank + 1), dim
        )
        factor = size * (size + 1) / 2
        torch.testing.assert_close(part, x.chunk(size, dim)[rank] * factor)
        whole = tensor_model_parallel_all_gather(part, dim)
        whole.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x * factor**2)

        x.grad = None
        total = tensor_model_parallel_all_reduce(
            tensor_model_parallel_copy(x) * (rank + 1)
        )
        total.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x * factor**2)


def check_losses(context) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    # With padding and without; the first tokens may be ruled out, on ranks all of them.
    for vocab, ruled_out in ((VOCAB, 0), (128, 0), (128, 64)):
        head = ParallelLMHead(vocab, 8)
        shard = head.shard_indices
        mine = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
        whole = torch.randn(2, 5, vocab, generator=generator, dtype=torch.float64) * 9
        whole[..., :ruled_out] = -torch.inf
        tokens = torch.randint(ruled_out, vocab, (2, 5), generator=generator)
        upstream = torch.randn(2, 5, generator=generator, dtype=torch.float64)

        exact = whole.clone().requires_grad_(True)
        expected = exact.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        (expected * upstream).sum().backward()
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            local = torch.full((2, 5, head.num_embeddings_per_partition), 1e4)
            local = local.to(dtype)  # the padding must not count
            local[..., : shard.num_org_elements] = whole[..., mine]
            local.requires_grad_(True)
            log_probs = vocab_parallel_token_log_probs(local, tokens, head)
            assert log_probs.dtype == dtype
            (log_probs * upstream.to(dtype)).sum().backward()
            close = functools.partial(
                torch.testing.assert_close, rtol=0, atol=tolerance, check_dtype=False
            )
            close(log_probs, expected)
            close(local.grad[..., : shard.num_org_elements], exact.grad[..., mine])
            assert not local.grad[..., shard.num_org_elements :].any()

            labels = tokens.clone()
            labels[0, :2] = -100
            for reduction in ("mean", "sum", "none"):
                loss = vocab_parallel_cross_entropy(
                    local, labels, head, reduction=reduction
                )
                wanted = F.cross_entropy(
                    whole.flatten(0, 1), labels.flatten(), reduction=reduction
                )
                close(loss.flatten(), wanted.flatten())
        outside = torch.full((2, 5), vocab)
        assert vocab_parallel_token_log_probs(local, outside, head).eq(-torch.inf).all()
        with pytest.raises(ValueError, match="expected .2, 5, "):
            vocab_parallel_token_log_probs(local[..., 1:], tokens, head)


def check_autocast(context) -> None:
    """A layer computes in autocast's dtype, its gradients are in their tensors'."""
    model = parallel_model(context)
    x = model.embedding(batch()).detach().requires_grad_(True)
    gate_up, _ = model.layers[0].gate_up(x)
    gate_up.sum().backward()
    expected = [x.grad, model.layers[0].gate_up.weight.grad]
    x.grad = model.layers[0].gate_up.weight.grad = None
    with torch.autocast(x.device.type, torch.bfloat16):
        low, _ = model.layers[0].gate_up(x)
    low.float().sum().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), gate_up, rtol=2e-2, atol=2e-2)
    gradients = [x.grad, model.layers[0].gate_up.weight.grad]
    torch.testing.assert_close(gradients, expected, rtol=2e-2, atol=2e-1)


def check_without_gradients(model: ParallelTransformer) -> None:
    """vLLM's own methods and collectives run, and give the same."""
    trained = parallel_loss(model)

    def fail(*args):
        raise AssertionError("called without gradients")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "copy"):
            patch.setattr(differentiable_collectives, name, fail)
        for name in ("_linear", "_embedding"):
            patch.setattr(trainable_parallel_layers, name, fail)
        ids = batch()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                hidden_states = model(ids[:, :-1], torch.arange(16))
        with pytest.raises(AssertionError, match="called without gradients"):
            model(ids[:, :-1], torch.arange(16))
    with torch.no_grad():
        logits = vocab_parallel_logits(model.lm_head, hidden_states)
        served = vocab_parallel_cross_entropy(logits, ids[:, 1:], model.lm_head)
    torch.testing.assert_close(served, trained.detach(), rtol=0, atol=1e-5)


def check_the_graph_without_gradients() -> None:
    """torch.compile sees what it sees of vLLM's undecorated methods."""
    layer = RowParallelLinear(8, 8)
    x = torch.ones(3, layer.input_size_per_partition)

    def graph() -> str:
        graphs = []

        def backend(module, example_inputs):
            graphs.append(module.print_readable(print_output=False))
            return module

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(layer, backend=backend, fullgraph=True)(x)
        (code,) = graphs
        return "\n".join(line for line in code.splitlines() if "#" not in line)

    hooked = graph()
    with pytest.MonkeyPatch.context() as patch:
        undecorated = UnquantizedLinearMethod.apply.__wrapped__
        patch.setattr(UnquantizedLinearMethod, "apply", undecorated)
        assert graph() == hooked


def check_compiled(context) -> None:
    """torch.compile traces layers and loss as one graph, and so their gradients."""
    gradients = []
    for compiled in (False, True):
        model = parallel_model(context)

        def loss(ids: torch.Tensor, model: ParallelTransformer = model) -> torch.Tensor:
            layer = model.layers[0]
            x = model.embedding(ids)
            gate, up = layer.gate_up(x)[0].chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)[0]
            logits = vocab_parallel_logits(model.lm_head, x)
            return vocab_parallel_cross_entropy(logits, ids, model.lm_head)

        if compiled:
            loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
        loss(batch()).backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        gradients.append([parameter.grad for parameter in trained])
    assert len(gradients[0]) == 6
    torch.testing.assert_close(*gradients)


def check_all(context) -> None:
    check_collectives(context)
    check_losses(context)
    for tied in (False, True):
        check_gradients(context, tied)
    check_autocast(context)
    check_without_gradients(parallel_model(context))


def check_loaded(context, folder: Path) -> None:
    """The checkpoint holds what a state dict of one device would, and is resumed."""
    model = parallel_model(context)
    optimizer = adamw(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state = {"training": TrainingState(model, optimizer), "steps": 0}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    assert state["steps"] == STEPS
    assert optimizer.param_groups[0]["lr"] == 5e-4

    whole = torch.load(folder / "whole.pt", weights_only=True)["training"]
    by_name = ParallelTransformer(context)
    load_full_checkpoint(by_name, whole["model"].items(), context)
    for (name, loaded), wanted in zip(
        model.named_parameters(), by_name.parameters(), strict=True
    ):
        assert torch.equal(loaded, wanted), name
    moments = whole["optimizer"]["state"]
    expected = parallel_model(
        context, {name: values["exp_avg_sq"] for name, values in moments.items()}
    )
    for parameter, wanted in zip(
        model.parameters(), expected.parameters(), strict=True
    ):
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], wanted)

    continued = json.loads((folder / "losses.json").read_text())
    losses = parallel_steps(model, optimizer, STEPS_AFTER)
    assert losses == pytest.approx(continued, rel=1e-5)


def train_and_save(folder: Path, context) -> None:
    check_all(context)
    check_the_graph_without_gradients()

    model = parallel_model(context)
    optimizer = adamw(model.parameters())
    losses = parallel_steps(model, optimizer, STEPS)
    expected = reference_steps(STEPS)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    check_replicas_stay_equal(context, model)

    optimizer.param_groups[0]["lr"] = 5e-4
    state = {"training": TrainingState(model, optimizer), "steps": STEPS}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    (folder / "served").mkdir(exist_ok=True)
    ShardedStateLoader.save_model(model, str(folder / "served"))
    losses = parallel_steps(model, optimizer, STEPS_AFTER)
    if context.tensor_parallel_rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
        dcp_to_torch_save(folder / "checkpoint", folder / "whole.pt")
    dist.barrier()
    check_loaded(context, folder)
    check_compiled(context)


def train_and_load(folder: Path, context) -> None:
    check_all(context)
    model = parallel_model(context)
    losses = parallel_steps(model, adamw(model.parameters()), STEPS)
    assert losses == pytest.approx(reference_steps(STEPS), rel=1e-5)
    check_replicas_stay_equal(context, model)
    check_loaded(context, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of what two ranks trained, having passed every check."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(functools.partial(train_and_save, folder), folder, 2)
    return folder


@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
def test_every_number_of_ranks_trains_alike(trained, tmp_path, tensor_parallel_size):
    function = functools.partial(train_and_load, trained)
    run_ranks(function, tmp_path, tensor_parallel_size)


def check_on_gpus(context) -> None:
    check_all(context)
    check_compiled(context)


@pytest.mark.parametrize(
    "tensor_parallel_size",
    [pytest.param(size, marks=pytest.mark.gpu(size)) for size in (1, 2, 4)],
)
def test_gradients_on_gpus(tmp_path, tensor_parallel_size):
    run_ranks(check_on_gpus, tmp_path, tensor_parallel_size)


@pytest.mark.engine
def test_trained_weights_serve_as_they_lie(trained, start, model_dir):
    from vllm import ModelRegistry, SamplingParams

    (trained / "served/config.json").write_text(json.dumps(CONFIG))
    shutil.rmtree(model_dir)
    shutil.copytree(trained / "served", model_dir)
    assert len(list(model_dir.glob("model-rank-*-part-0.safetensors"))) == 2

    ModelRegistry.register_model("ParallelTransformer", build)
    llm = start(
        processes=True,
        tensor_parallel_size=2,
        load_format="sharded_state",
        max_model_len=CONFIG["max_position_embeddings"],
    )
    prompts = [batch()[i, : 4 + i].tolist() for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )

    weights = torch.load(trained / "whole.pt", weights_only=True)["training"]["model"]
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        for _ in range(12):
            logits = reference_logits(weights, torch.tensor([ids]))[0, -1]
            ids.append(int(logits.argmax()))
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]
