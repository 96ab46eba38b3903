# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a factory makes while the engine's dtype is the default one."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import HIDDEN, TinyModel
from torch import nn

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.callable_model.precision import (
    Float32Constants,
    keep_float32,
    round_constants,
)
from vllm.utils.torch_utils import set_default_torch_dtype

DIM = 32


class Constants(nn.Module):
    """The constants of models, computed as their authors do."""

    def __init__(self) -> None:
        super().__init__()
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, DIM, 2) / DIM))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("table", torch.outer(torch.arange(800), inv_freq).cos())
        mask = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.slopes = torch.tensor([0.1, 0.3])
        self.register_buffer("step", torch.arange(3))


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.router = nn.Linear(4, 4, dtype=torch.float32)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, 5, dtype=torch.float32)))
        self.narrow = nn.Parameter(torch.ones(4, dtype=torch.float16))
        shared = nn.Parameter(torch.rand(4))
        self.one, self.other = nn.Module(), nn.Module()
        self.one.weight = self.other.weight = shared
        self.norm = nn.LayerNorm(4).float()


def build(factory, dtype=torch.bfloat16):
    with set_default_torch_dtype(dtype), Float32Constants(dtype) as precision:
        module = factory()
        assert torch.get_default_dtype() == dtype
    return module, precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constants_have_the_bits_of_training(dtype):
    module, precision = build(Constants, dtype)
    trainers = Constants()
    for name, buffer in trainers.named_buffers():
        assert buffer.dtype == module.get_buffer(name).dtype
        assert torch.equal(buffer, module.get_buffer(name)), name
    assert torch.equal(module.slopes, trainers.slopes)
    names = [name for _, name in precision.computed(module)]
    assert sorted(names) == ["inv_freq", "mask", "slopes", "table"]


def test_parameters_have_the_engines_dtype_unless_one_is_asked_for():
    module, _ = build(Parameters)
    dtypes = {name: p.dtype for name, p in module.named_parameters()}
    assert dtypes == {
        "linear.weight": torch.bfloat16,
        "linear.bias": torch.bfloat16,
        "scale": torch.bfloat16,
        "router.weight": torch.float32,
        "router.bias": torch.float32,
        "a_log": torch.float32,
        "narrow": torch.float16,
        "one.weight": torch.bfloat16,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
    }
    assert module.one.weight is module.other.weight


def test_a_module_that_is_cast_by_its_factory_is_left_alone():
    module, precision = build(lambda: Constants().to(torch.bfloat16))
    assert module.inv_freq.dtype == torch.bfloat16
    assert torch.equal(module.inv_freq, Constants().inv_freq.bfloat16())
    assert [name for _, name in precision.computed(module)] == ["slopes"]


def test_a_default_of_the_factorys_own_counts():
    def factory():
        with set_default_torch_dtype(torch.float32):
            return nn.Linear(4, 4)

    assert build(factory)[0].weight.dtype == torch.float32


def test_other_threads_build_as_before():
    built = []

    def factory():
        thread = threading.Thread(
            target=lambda: built.append(nn.Linear(4, 4, dtype=torch.float32))
        )
        thread.start()
        thread.join()
        return nn.Module()

    build(factory)
    assert built[0].weight.dtype == torch.float32


def test_the_hook_goes_when_the_factory_fails():
    with pytest.raises(ZeroDivisionError):
        build(lambda: 1 / 0)
    assert nn.Linear(4, 4).weight.dtype == torch.float32


def test_rounding():
    module, precision = build(Constants)
    names = round_constants(precision.computed(module), torch.bfloat16)
    assert "Constants.inv_freq" in names
    assert torch.equal(module.inv_freq, Constants().inv_freq.bfloat16())


class Rotary(TinyModel):
    """Its positions are angles, of frequencies that it computes."""

    def __init__(self) -> None:
        super().__init__()
        del self.positions
        self.constants = Constants()
        self.rotary_out = nn.Linear(DIM // 2, HIDDEN)

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * self.constants.inv_freq
        return self.rotary_out(angles.cos().to(self.rotary_out.weight.dtype))


@pytest.mark.engine
def test_served(start, model_dir, monkeypatch):
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    ModelRegistry.register_model("TinyModel", lambda c, p: Rotary())
    trainers = Rotary()
    save_file(trainers.state_dict(), model_dir / "model.safetensors")
    llm = start(dtype="bfloat16")
    (served,) = llm.apply_model(
        lambda model: {k: v.clone() for k, v in model.named_buffers()}
    )
    assert torch.equal(served["constants.inv_freq"], trainers.constants.inv_freq)
    (dtypes,) = llm.apply_model(lambda model: {p.dtype for p in model.parameters()})
    assert dtypes == {torch.bfloat16}
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    output = llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    "dtype, device, products, invariant, expected",
    [
        (torch.float32, "cuda", "highest", "0", "ieee"),
        (torch.float32, "cuda", "high", "0", None),  # the user wants TF32
        (torch.float32, "cuda", "highest", "1", None),
        (torch.bfloat16, "cuda", "highest", "0", None),
        (torch.float32, "cpu", "highest", "0", None),
    ],
)
def test_triton_multiplies_float32_as_pytorch_does(
    monkeypatch, dtype, device, products, invariant, expected
):
    monkeypatch.setenv("TRITON_F32_DEFAULT", "")  # restored at the end
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", invariant)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: products)
    keep_float32(dtype, torch.device(device))
    assert os.environ.get("TRITON_F32_DEFAULT") == expected


def test_a_users_precision_of_triton_is_kept(monkeypatch):
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    keep_float32(torch.float32, torch.device("cuda"))
    assert os.environ["TRITON_F32_DEFAULT"] == "tf32"
