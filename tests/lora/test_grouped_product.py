# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The operator of every LoRA: its gradient, its bits, and compiled code."""

import torch
from torch import nn

from vllm.lora.ops.grouped_product import NO_ADAPTER, expand_stack, shrink_stack
from vllm.lora.site_hooks import BatchRows, SiteHook, Slots
from vllm.lora.sites import find_sites
from vllm.model_executor.parallel_context import ParallelContext

product = torch.ops.vllm.lora_grouped_product
ROWS = torch.tensor([0, 0, NO_ADAPTER, 2, 2, 0, 1])
RANKS = torch.tensor([2, 0, 3])


def factors(width: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(int(rank), width, dtype=dtype) for rank in RANKS]


def both(x, a, b):
    return product(product(x, ROWS, a, RANKS, True), ROWS, b, RANKS, False)


def test_rows_get_their_own_adapter():
    x, a, b = torch.randn(7, 5).double(), factors(5), factors(4)
    out = both(x, a, b)
    for row, slot in enumerate(ROWS.tolist()):
        expected = torch.zeros(4).double()
        if slot != NO_ADAPTER:
            expected = x[row] @ a[slot].t() @ b[slot]
        torch.testing.assert_close(out[row], expected)


def test_gradients():
    inputs = [torch.randn(7, 5).double(), *factors(5), *factors(4)]
    inputs = [value.requires_grad_() for value in inputs]

    def function(x, *ab):
        return both(x, list(ab[:3]), list(ab[3:]))

    assert torch.autograd.gradcheck(function, inputs)
    torch.library.opcheck(product, (inputs[0].detach(), ROWS, factors(5), RANKS, True))


def test_rows_without_an_adapter_keep_all_bits():
    y = torch.tensor([[0.0, -0.0, 1.5, float("inf")]])
    rows = torch.tensor([NO_ADAPTER])
    narrow = product(torch.randn(1, 5), rows, factors(5, torch.float32), RANKS, True)
    delta = product(narrow, rows, factors(4, torch.float32), RANKS, False)
    assert torch.equal((y + delta).view(torch.int32), y.view(torch.int32))


def test_an_adapter_has_the_same_bits_in_a_padded_slot_among_others():
    x, a, b = torch.randn(7, 48), factors(48, torch.float32), factors(40, torch.float32)
    padded_a = [nn.functional.pad(f, (0, 0, 0, 16 - f.shape[0])) for f in a]
    padded_b = [nn.functional.pad(f, (0, 0, 0, 16 - f.shape[0])) for f in b]
    among = both(x, padded_a, padded_b)
    mine = ROWS == 2
    alone_rows, rank = torch.zeros(2, dtype=torch.long), RANKS[2:]
    narrow = product(x[mine], alone_rows, a[2:], rank, True)
    assert torch.equal(among[mine], product(narrow, alone_rows, b[2:], rank, False))


def test_the_broken_adapter_of_another_row():
    x, a, b = torch.randn(7, 5), factors(5, torch.float32), factors(4, torch.float32)
    a[0].fill_(float("nan"))
    b[0].fill_(float("inf"))
    assert both(x, a, b)[ROWS != 0].isfinite().all()


def test_a_stack_gives_what_slots_give():
    """What an engine computes on a GPU, where it does not know the rows."""
    x, a, b = torch.randn(7, 48), factors(48, torch.float32), factors(40, torch.float32)
    stack_a, stack_b = (
        torch.stack([nn.functional.pad(f, (0, 0, 0, 4 - f.shape[0])) for f in which])
        for which in (a, b)
    )
    narrow = shrink_stack(x, ROWS, stack_a)
    found = expand_stack(narrow, ROWS, stack_b, RANKS)
    torch.testing.assert_close(found, both(x, a, b))
    without = found[(ROWS == NO_ADAPTER) | (ROWS == 1)]  # of which 1 has rank 0
    assert without.eq(0).all() and without.signbit().all()


def test_adding_in_place():
    x, a, b = torch.randn(7, 48), factors(48, torch.float32), factors(40, torch.float32)
    stacks = [
        torch.stack([nn.functional.pad(f, (0, 0, 0, 4 - f.shape[0])) for f in which])
        for which in (a, b)
    ]
    scales = torch.tensor([1.0, 2.0, 0.5])
    output = torch.randn(7, 40)
    row_scales = scales[ROWS.clamp(min=0)].unsqueeze(1)
    expected = output + both(x, a, b) * row_scales
    for any_adapter, result in ((False, output.clone()), (True, expected)):
        torch.ops.vllm.lora_add(
            output, x, ROWS, *stacks, RANKS, scales, torch.tensor(any_adapter)
        )
        torch.testing.assert_close(output, result)
    torch.library.opcheck(
        torch.ops.vllm.lora_add.default,
        (output, x, ROWS, *stacks, RANKS, scales, torch.tensor(True)),
    )


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.embedding(ids))))


def test_compiled_code_runs_with_later_batches():
    model = Small().requires_grad_(False)
    rows = BatchRows(torch.full((32,), NO_ADAPTER, dtype=torch.int32))
    for site in find_sites(model, ParallelContext()).values():
        hook = SiteHook(site, rows)
        a, b = factors(site.inputs, torch.float32), factors(site.outputs, torch.float32)
        hook.slots = Slots(a, b, RANKS, torch.tensor([1.0, 2.0, 0.5]))
        hook.attach()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for number in (5, 9, 17):
        ids = torch.randint(50, (number,))
        rows.slots[:number] = torch.randint(-1, 3, (number,))
        torch.testing.assert_close(compiled(ids), model(ids))
