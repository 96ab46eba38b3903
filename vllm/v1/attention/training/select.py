# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which kernel computes an attention in training."""

import torch

from vllm.logger import init_logger
from vllm.v1.attention.training.blockwise import blockwise_attention
from vllm.v1.attention.training.kernel import AttentionKernel, AttentionParams
from vllm.v1.attention.training.sdpa import sdpa_attention
from vllm.v1.attention.training.sequences import Sequences

logger = init_logger(__name__)


def select_kernel(
    q: torch.Tensor, k: torch.Tensor, sequences: Sequences, params: AttentionParams
) -> AttentionKernel:
    """The kernel for these tensors; every choice of one is made here.

    The backward of flash attention has a choice of its own: `backward.py`.

    Args:
        q: `[..., heads, head_dim]`; only its device, dtype and shape are read.
        k: `[..., kv_heads, head_dim]`, of which the same holds.
        sequences: What the leading axes of q and k hold.
        params: What the kernel has to compute.
    """
    if q.is_cuda:
        # Imported here, because it registers CUDA operators.
        from vllm.v1.attention.training import flash

        if params.dropout > 0:
            reason = flash.dropout_unsupported(q, params)
            kernel = flash.flash_attention_with_dropout
        else:
            reason = flash.unsupported(q, params)
            kernel = flash.flash_attention
        if reason is None:
            return kernel
        if not torch.compiler.is_compiling():
            logger.warning_once(
                "TrainableAttention: flash attention cannot do %s here; PyTorch's "
                "kernels are used, which are slower.",
                reason,
            )
    if q.device.type == "cpu":
        # Imported here, because it loads a compiled library and warns if there is none.
        from vllm.v1.attention.training import cpu

        if cpu.unsupported(q, k, params) is None:
            return cpu.cpu_attention
    if (
        params.dropout > 0
        or params.logits_soft_cap is not None
        or params.sinks is not None
    ):
        return blockwise_attention
    window = params.sliding_window
    if window is not None and window < sequences.max_seqlen:
        return blockwise_attention
    return sdpa_attention
