# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Blocks that are copied, summed and looked at together, in one pass on a GPU.

On a CPU the kernel runs in Triton's interpreter; on a GPU (`-m gpu`) it is compiled.
Blocks of a CPU are NumPy's.
"""

from itertools import product

import pytest
import torch
from triton_interpreter import interpret

from vllm.distributed.weight_sync import blocks, cpu_blocks, gpu_blocks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [8, 50_000, 4096]


def check(device: str) -> int:
    """Sums, copies, and each kind of value that is not finite; counts what it tried."""
    tried = 0
    # So few words that blocks are read in several parts, some of them short.
    gpu_blocks.PART = 4096
    for dtype in DTYPES:
        blocks = []
        for size in SIZES:
            generator = torch.Generator().manual_seed(size)
            block = torch.randn(size, generator=generator).to(device, dtype)
            limits = torch.finfo(dtype)
            edges = [limits.max, limits.min, limits.tiny, -0.0]
            block[:4] = torch.tensor(edges, dtype=dtype)
            blocks.append(block)
        words = [block.view(torch.int64) for block in blocks]
        expected = torch.stack([each.sum() for each in words])
        places = [torch.zeros_like(block) for block in blocks]
        bits, totals = gpu_blocks.read(blocks, places)
        assert torch.equal(bits, expected) and totals.tolist() == [0.0] * len(SIZES)
        for place, each in zip(places, words, strict=True):
            assert torch.equal(place.view(torch.int64), each)
        bits, _ = gpu_blocks.read(blocks, look=False)
        assert torch.equal(bits, expected)
        for odd, where in product((float("inf"), -float("inf"), float("nan")), (0, -1)):
            for number in range(len(SIZES)):
                wrong = [block.clone() for block in blocks]
                wrong[number][where] = odd
                _, totals = gpu_blocks.read(wrong)
                which = totals.isnan().nonzero().flatten().tolist()
                assert which == [number], (dtype, odd, where)
                tried += 1
    return tried


def interpreted() -> int:
    return check("cpu")


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton.runtime.interpreter")
    assert interpret(__file__, "interpreted") == len(DTYPES) * len(SIZES) * 6


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert check("cuda") == len(DTYPES) * len(SIZES) * 6


@pytest.mark.gpu
def test_what_is_taken() -> None:
    """Whole words that lie together, and a copy within one GPU, in one dtype."""
    block = torch.zeros(8, 8, dtype=torch.bfloat16, device="cuda")
    assert gpu_blocks.can_read(block) and gpu_blocks.can_copy(block, block.clone())
    for other in (block.cpu(), block[:, 1:], block.view(-1)[:3], block.view(-1)[1:5]):
        assert not gpu_blocks.can_read(other)
    assert not gpu_blocks.can_copy(block.float(), block)
    assert not gpu_blocks.can_copy(block.cpu(), block)


def by_words(block: torch.Tensor) -> int:
    """The sum of what a block has, as integers of 8 bytes that lie in a row."""
    return int(
        block.clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.int64)
        .sum()
    )


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_a_cpu(monkeypatch, source, dtype) -> None:
    """Copied or cast, in several parts, the last of them short."""
    monkeypatch.setattr(cpu_blocks, "PART", 1 << 12)
    block = torch.randn(37, 1000, generator=torch.Generator().manual_seed(0)).to(source)
    place = torch.zeros_like(block, dtype=dtype)
    assert cpu_blocks.can_copy(place, block, True)
    sums = blocks.copy_block(place, block, values=True)
    assert torch.equal(place, block.to(dtype))
    assert int(sums.checksum()) == by_words(place) and float(sums.total()) == 0
    assert int(blocks.checksum(place)) == by_words(place)
    for odd, where in product((float("inf"), -float("inf"), float("nan")), (0, -1)):
        wrong = block.clone()
        wrong[where, where] = odd
        assert blocks.copy_block(place, wrong, values=True).total().isnan()
        assert blocks.sum_block(wrong).total().isnan()


def test_other_blocks_of_a_cpu() -> None:
    """What has no words that lie together is read another way, with the same sums."""
    whole = torch.arange(64 * 64, dtype=torch.float32).view(64, 64)
    for block in (whole[:, 8:40], whole.t(), whole.view(-1)[1:9], whole[:, 3:5]):
        assert not cpu_blocks.can_read(block, True)
        place = torch.zeros(block.shape)
        sums = blocks.copy_block(place, block, values=True)
        assert torch.equal(place, block) and float(sums.total()) == 0
        expected = by_words(block)
        assert int(sums.checksum()) == int(blocks.checksum(block)) == expected
    numbers = torch.arange(16, dtype=torch.int64)
    sums = blocks.sum_block(numbers)
    assert int(sums.checksum()) == 120 and float(sums.total()) == 0
    coarse = torch.ones(16).to(torch.float8_e4m3fn)  # its bits have no infinity
    assert not cpu_blocks.can_read(coarse, True) and cpu_blocks.can_read(coarse, False)
    assert int(blocks.checksum(coarse)) == by_words(coarse)
