# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sums over ranks whose GPUs read each other's memory.

The ranks' sums are float32, and the batch-invariant mode leaves NCCL one channel, so an
all-gather of them takes longer than the product. Here each rank puts its sum where the
others can read it, and one kernel reads and adds them, in the order of the tree.
"""

import socket
from functools import cache

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

logger = init_logger(__name__)

# Bytes of each rank that its peers can read. A longer sum takes several rounds.
ROOM = 32 * 2**20
BLOCK = 1024


class PeerRoom:
    """Memory of each rank that all ranks of a group can read.

    Making one is a collective call.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.own = symmetric_memory.empty(ROOM // 4, dtype=torch.float32, device=device)
        self._handle = symmetric_memory.rendezvous(self.own, group)
        rooms = [
            self._handle.get_buffer(rank, self.own.shape, self.own.dtype)
            for rank in range(group.size())
        ]
        addresses = [room.data_ptr() for room in rooms]
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)

    def meet(self) -> None:
        """Let this device wait until all of them have come here."""
        self._handle.barrier()


@cache
def room_of(group: dist.ProcessGroup) -> PeerRoom | None:
    """The room of a group, or None unless NVLink joins all of its GPUs.

    It is None, too, if memory cannot be shared on any of them. The first call is a
    collective one.
    """
    if not current_platform.is_cuda():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    number = current_platform.visible_device_id_to_physical_device_id(device.index)
    found = [("", 0)] * group.size()
    dist.all_gather_object(found, (socket.gethostname(), number), group)
    hosts, numbers = zip(*found, strict=True)
    if len(set(hosts)) > 1 or not current_platform.is_fully_connected(list(numbers)):
        return None
    room, failure = None, ""
    try:
        room = PeerRoom(group, device)
    except RuntimeError as error:  # as where a container forbids it
        failure = str(error)
    failures = [failure] * group.size()
    dist.all_gather_object(failures, failure, group)
    if why := next(filter(None, failures), ""):
        logger.warning(
            "GPUs of this group could read each other's memory, but it cannot be "
            "shared: %s. Sums over ranks go through NCCL, with the same bits and more "
            "slowly.",
            why.splitlines()[0],
        )
        return None
    return room


def sum_of_peers(
    room: PeerRoom, local: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`tree_total` of what the ranks have.

    Args:
        room: Of the ranks. All of them call this function with one shape.
        local: Float32 `[rows, outputs]`, of this rank.
        bias: `[outputs]`, the same on all ranks.
        dtype: Of the result.

    Returns:
        `[rows, outputs]`, the same on all ranks.

    """
    rows, outputs = local.shape
    out = local.new_empty((rows, outputs), dtype=dtype)
    step = max(1, room.own.numel() // max(1, outputs))
    for first in range(0, rows, step):
        part, result = local[first : first + step], out[first : first + step]
        room.own[: part.numel()].view(part.shape).copy_(part)
        room.meet()  # all parts are there
        run_sum(room.addresses, bias, result)
        room.meet()  # all are read, so the next ones may come
    return out


def run_sum(
    addresses: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Add float32 sums at some addresses, one for each rank, and the bias.

    Args:
        addresses: int64 `[ranks]`, a power of two.
        bias: `[outputs]`, or None.
        out: `[rows, outputs]`, contiguous; it is written to.

    """
    if out.numel():
        _sum_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            addresses,
            bias,
            out,
            out.numel(),
            out.shape[-1],
            RANKS=addresses.numel(),
            HAS_BIAS=bias is not None,
            BLOCK=BLOCK,
        )


@triton.jit
def _sum_of_ranks(  # type: ignore[no-untyped-def]
    addresses, offsets, inside, RANKS: tl.constexpr
):
    if RANKS == 1:
        parts = tl.load(addresses).to(tl.pointer_type(tl.float32))
        total = tl.load(parts + offsets, mask=inside, other=0.0)
    else:
        HALF: tl.constexpr = RANKS // 2
        left = _sum_of_ranks(addresses, offsets, inside, HALF)
        right = _sum_of_ranks(addresses + HALF, offsets, inside, HALF)
        total = left + right
    return total


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    addresses,  # int64 [RANKS], each of float32 [numel]
    bias,  # [outputs]
    out,  # [numel]
    numel,
    outputs,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = _sum_of_ranks(addresses, offsets, inside, RANKS)
    if HAS_BIAS:
        column = offsets % outputs
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)
