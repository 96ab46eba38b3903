# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Each published loss and its gradient against float64, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm.lora.adapter import Adapter
from vllm.lora.adapter_trainer import AdamWParams
from vllm_generic.tink import wire
from vllm_generic.tink.backends import hf_model
from vllm_generic.tink.backends.base import Batch, Datum, LoraSpec, Trainer
from vllm_generic.tink.backends.hf_trainer import HFTrainer
from vllm_generic.tink.backends.module_trainer import ModuleTrainer
from vllm_generic.tink.backends.packed_model import pack
from vllm_generic.tink.backends.tiny_model import make_tiny_model
from vllm_generic.tink.codec import decode_batch, parse_batch
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.losses import check_batch

LENGTH, VOCAB, TARGETS = 12, 1024, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=["hf", "one by one", "packed"])
def trainer(request: pytest.FixtureRequest, folder: Path) -> Trainer:
    """One run, after a step: neither factor of the adapter is zero."""
    base = hf_model.load_base(folder, "cpu")
    trainer: Trainer
    if request.param == "hf":
        trainer = HFTrainer(base)
    else:
        trainer = ModuleTrainer(pack(base), packed=request.param == "packed")
    trainer.create("run", LoraSpec(rank=4, seed=1))
    trainer.forward_backward({"run": Batch([_datum(weights=True)], "cross_entropy")})
    trainer.optim_step("run", AdamWParams(learning_rate=1e-2))
    return trainer


def _take_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients of the run by PEFT's names, which are cleared."""
    if isinstance(trainer, HFTrainer):
        parameters = trainer._named_parameters("run")
        grads = {key.replace(".run1.", "."): p.grad for key, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        return grads
    assert isinstance(trainer, ModuleTrainer)
    own = trainer._trainer.adapters["run"]
    grads = Adapter(
        own.config, {name: (a.grad, b.grad) for name, (a, b) in own.factors.items()}
    ).state_dict()
    trainer._trainer.clear_gradients("run")
    return grads


def _in_float64(trainer: Trainer, base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    trainer.export("run").save(adapter)
    model = hf_model.load_base(base, "cpu")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval().double()


def _datum(seed: int = 0, k: int | None = None, **which: Any) -> Datum:
    """Random inputs; the sampler's log-probabilities are near a random model's."""
    random = np.random.default_rng(seed)
    shape = (LENGTH,) if k is None else (LENGTH, k)
    inputs = {"target_tokens": random.integers(0, VOCAB, shape)}
    if which.get("weights"):
        inputs["weights"] = random.random(shape, np.float32)
    else:
        inputs["logprobs"] = -7 - random.random(shape, np.float32)
        inputs["advantages"] = random.standard_normal(shape).astype(np.float32)
    if which.get("mask"):
        inputs["sequence_ratio_mask"] = (np.arange(LENGTH) > 3).astype(np.float32)
    return Datum(random.integers(0, VOCAB, LENGTH), inputs)


def _reference(name: str, lp: torch.Tensor, x: dict[str, torch.Tensor], c: Any) -> Any:
    """The published formulas, token by token."""
    if name == "cross_entropy":
        return (-lp * x["weights"]).sum()
    total = lp.new_zeros(())
    log_ratio = lp - x["logprobs"]
    if name == "gspo":
        mean = log_ratio[x["sequence_ratio_mask"] != 0].detach().mean()
    for t in range(len(lp)):
        a, r = x["advantages"][t], log_ratio[t].exp()
        if name == "importance_sampling":
            total = total - r * a
        elif name == "dro":
            total = total - (lp[t] * a - c["beta"] / 2 * log_ratio[t] ** 2)
        else:
            low, high = c["clip_low_threshold"], c["clip_high_threshold"]
            if name == "cispo":
                total = total - r.detach().clamp(low, high) * lp[t] * a
                continue
            if name == "gspo":
                r = torch.exp(mean + lp[t] - lp[t].detach())
            total = total - torch.min(r * a, r.clamp(low, high) * a)
    return total


CLIP = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}


@pytest.mark.parametrize(
    ("name", "data", "config"),
    [
        ("cross_entropy", [_datum(1, weights=True), _datum(2, weights=True)], {}),
        ("cross_entropy", [_datum(1, k=TARGETS, weights=True)], {}),
        ("importance_sampling", [_datum(1), _datum(2)], {}),
        ("ppo", [_datum(1), _datum(2)], CLIP),
        ("cispo", [_datum(1), _datum(2)], CLIP),
        ("dro", [_datum(1), _datum(2)], {"beta": 0.3}),
        ("gspo", [_datum(1, mask=True), _datum(2, mask=True)], CLIP),
    ],
)
def test_loss_and_gradient(
    trainer: Trainer,
    name: str,
    data: list[Datum],
    config: dict[str, float],
    folder: Path,
    tmp_path: Path,
) -> None:
    data = copy.deepcopy(data)
    # the sampler's values are near the model's, so that only some ratios are clipped
    scored = Batch(
        [
            Datum(
                d.tokens,
                {
                    "target_tokens": d.loss_inputs["target_tokens"],
                    "weights": np.zeros(d.loss_inputs["target_tokens"].shape, "f4"),
                },
            )
            for d in data
        ],
        "cross_entropy",
        forward_only=True,
    )
    model = trainer.forward_backward({"run": scored})["run"].logprobs
    noise = np.random.default_rng(9)
    if name != "cross_entropy":
        for d, lp in zip(data, model, strict=True):
            shift = noise.uniform(-0.3, 0.3, lp.shape)
            d.loss_inputs["logprobs"] = (lp + shift).astype(np.float32)
    batch = Batch(data, name, config)
    check_batch(batch, 2048, VOCAB)
    out = trainer.forward_backward({"run": batch})["run"]
    grads = _take_gradients(trainer)
    exact = _in_float64(trainer, folder, tmp_path)
    total = torch.zeros((), dtype=torch.float64)
    for d, lp in zip(data, out.logprobs, strict=True):
        logits = exact(input_ids=torch.from_numpy(d.tokens)[None]).logits[0]
        assert logits.dtype == torch.float64
        targets = torch.from_numpy(d.loss_inputs["target_tokens"])
        every = torch.log_softmax(logits, -1)
        picked = every.gather(-1, targets.reshape(LENGTH, -1)).reshape(targets.shape)
        assert lp.shape == targets.shape
        assert lp == pytest.approx(picked.detach().numpy(), abs=2e-5)
        inputs = {
            key: torch.from_numpy(value).double()
            for key, value in d.loss_inputs.items()
        }
        total = total + _reference(name, picked, inputs, config)
    total.backward()
    assert out.metrics["loss:sum"] == pytest.approx(float(total), rel=1e-5, abs=1e-4)
    exact_parameters = {
        key.replace(".default.", "."): p for key, p in exact.named_parameters()
    }
    assert len(grads) == 2 * 15
    for key, grad in grads.items():
        reference = exact_parameters[key].grad
        scale = float(reference.abs().max())
        torch.testing.assert_close(
            grad.double(), reference, rtol=1e-3, atol=1e-4 * scale + 1e-7
        )


def _request(**fields: Any) -> Any:
    message = wire.ForwardBackwardRequest(model_id="m", seq_id=1, **fields)
    return parse_batch(message.SerializeToString())


def test_sparse_tensors_are_read() -> None:
    from tinker import types
    from tinker.proto.request_conv import forward_backward_request_to_proto

    dense = torch.zeros(4, 50, dtype=torch.int64)
    dense[1, 3], dense[2, 0] = 7, 9
    weights = torch.zeros(4, 50)
    weights[1, 3] = -0.5
    data = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch_sparse(dense),
            "weights": types.TensorData.from_torch_sparse(weights),
        },
    )
    request = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(
            data=[data], loss_fn="cross_entropy"
        ),
        model_id="m",
        seq_id=1,
    )
    body = forward_backward_request_to_proto(request).SerializeToString()
    message = parse_batch(body)
    assert (
        message.data[0].loss_fn_inputs["weights"].WhichOneof("layout") == "sparse_csr"
    )
    (read,) = decode_batch(message).data
    assert (read.loss_inputs["target_tokens"] == dense.numpy()).all()
    assert (read.loss_inputs["weights"] == weights.numpy()).all()


def _with(datum: Datum, **inputs: Any) -> Datum:
    kept = {k: v for k, v in (datum.loss_inputs | inputs).items() if v is not None}
    return Datum(datum.tokens, kept)


GOOD = _datum(weights=True)
LONG = Datum(np.zeros(3000, np.int64), {})


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (Batch([GOOD], "stable_reinforce"), "its definition is not public"),
        (Batch([GOOD], "mse"), "loss_fn 'mse' is unknown"),
        (Batch([GOOD], "cross_entropy", {"beta": 1.0}), r"\['beta'\], which cross"),
        (Batch([], "cross_entropy"), "no datum"),
        (Batch([GOOD, _with(GOOD, weights=None)], "cross_entropy"), "datum 1: cross"),
        (Batch([_with(GOOD, mask=np.ones(12))], "cross_entropy"), "'mask'"),
        (Batch([_with(GOOD, weights=np.ones(5))], "cross_entropy"), r"shape \[5\]"),
        (
            Batch([_with(GOOD, target_tokens=np.full(12, VOCAB))], "cross_entropy"),
            "target_tokens has the token 1024; expected 0 to 1023",
        ),
        (Batch([_datum(k=2)], "ppo"), r"\[12, 2\]; ppo takes \[N\]"),
        (
            Batch([Datum(LONG.tokens, GOOD.loss_inputs)], "cross_entropy"),
            "3000 tokens; expected 1 to 2048",
        ),
    ],
)
def test_what_is_refused(batch: Batch, text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_batch(batch, 2048, VOCAB)


def test_images_are_refused() -> None:
    message = _request()
    message.data.add().model_input.add().image.data = b"png"
    with pytest.raises(UserError, match="takes text only"):
        decode_batch(message)


def test_the_table_is_the_clients() -> None:
    """Numbers, types and labels of all fields, down to the last message."""
    from tinker.proto import tinker_public_pb2

    def fields(message: Any) -> list[Any]:
        found = []
        for f in sorted(message.fields, key=lambda f: f.number):
            inner = None if f.message_type is None else fields(f.message_type)
            found.append(
                (f.number, f.name, f.type, f.is_repeated, f.has_presence, inner)
            )
        return found

    for name in ("ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"):
        ours = fields(getattr(wire, name).DESCRIPTOR)
        assert ours == fields(getattr(tinker_public_pb2, name).DESCRIPTOR)


def test_runs_in_one_pass(folder: Path) -> None:
    """Packed with others a run has the gradients and metrics that it has alone."""
    alone, packed = (
        ModuleTrainer(pack(hf_model.load_base(folder, "cpu")), packed=which)
        for which in (False, True)
    )
    batches = {
        "a": Batch([_datum(1, weights=True), _datum(2, weights=True)], "cross_entropy"),
        "b": Batch([_datum(3)], "importance_sampling"),
        "c": Batch([_datum(4, k=3, weights=True)], "cross_entropy", forward_only=True),
    }
    outputs = []
    for trainer in (alone, packed):
        for rank, run in enumerate(batches, start=3):
            trainer.create(run, LoraSpec(rank=rank, seed=rank))
        outputs.append(trainer.forward_backward(batches))
        assert trainer.optim_step("c", AdamWParams())["grad_norm:mean"] == 0
    for run, batch in batches.items():
        one, other = (output[run] for output in outputs)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
        assert len(one.logprobs) == len(batch.data)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        norms = [
            trainer.optim_step(run, AdamWParams())["grad_norm:mean"]
            for trainer in (alone, packed)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_export_is_loaded_by_peft(
    trainer: Trainer, folder: Path, tmp_path: Path
) -> None:
    exact = _in_float64(trainer, folder, tmp_path)
    scored = Batch([_datum(1, weights=True)], "cross_entropy", forward_only=True)
    (found,) = trainer.forward_backward({"run": scored})["run"].logprobs
    tokens = torch.from_numpy(scored.data[0].tokens)
    targets = torch.from_numpy(scored.data[0].loss_inputs["target_tokens"])
    with torch.no_grad():
        logits = exact(input_ids=tokens[None]).logits[0]
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    assert found == pytest.approx(expected.numpy(), abs=2e-5)
