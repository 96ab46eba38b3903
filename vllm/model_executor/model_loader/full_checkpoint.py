# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Load a full, unsharded checkpoint by name into a module, whatever shards it."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import nn

from vllm.model_executor.parallel_context import ParallelContext
from vllm.model_executor.parameters.load import weights_of

# Parts of the RuntimeError that PyTorch raises for a file that is not whole.
READING_ERRORS = ("PytorchStreamReader", "unexpected EOF", "corrupt")


def load_full_checkpoint(
    module: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    context: ParallelContext,
    source: str = "the checkpoint",
) -> set[str]:
    """Fill tensors of `module`'s state dict from `weights`, by name.

    The first load fills all of them, or is an error. Later ones take any part, in any
    order, in place. A list, dict items or another collection is checked before
    anything is written; of an iterator, each tensor before it is written.

    A pipeline stage fills its own part, as does an expert-parallel rank: a tensor is
    surplus only if no rank takes it, and all these ranks have to make the first load
    together. megatron-core numbers the layers of a stage, and the experts of a rank,
    from 0; here they have the names that they have in the whole model.

    Args:
        module: its parameters and buffers may be plain, DTensors, megatron-core's
            tensor-parallel parameters, or those of vLLM's parallel layers.
        weights: pairs of name and full tensor. Of names that share one parameter
            (tied weights) one is enough; the parts of a name that torch.compile, FSDP,
            DDP or activation checkpointing put in may be there or not.
        context: the place of this rank.
        source: where the weights come from, for messages.

    Returns:
        The names that were filled, as `state_dict()` and as `named_parameters()` have
        them.

    Raises:
        ValueError: a tensor is missing, surplus or mis-shaped, two names of one
            parameter bring different tensors, or the checkpoint cannot be read. The
            message names every such tensor.

    """
    return weights_of(module, context).load(readable(weights, source), source)


def readable(
    weights: Iterable[tuple[str, torch.Tensor]], source: str
) -> Iterable[tuple[str, torch.Tensor]]:
    """`weights`, with a ValueError if a file that is read is not whole."""
    return weights if isinstance(weights, Collection) else _read(weights, source)


def _read(
    weights: Iterable[tuple[str, torch.Tensor]], source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from weights
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _unreadable(source, error) from error
        raise ValueError(
            f"{source} holds a pickle that is not plain tensors, and is not run. Save "
            f"the weights as safetensors, or as torch.save(state_dict). ({error})"
        ) from error
    except (SafetensorError, EOFError) as error:
        raise _unreadable(source, error) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in READING_ERRORS):
            raise
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> ValueError:
    return ValueError(
        f"{source} cannot be read: {error}. Check that it holds whole *.safetensors or "
        "*.pt files; a truncated one has to be copied or saved again."
    )
