# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The attention calls of a trainer's module, by the kernels that vLLM trains with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vllm.model_executor.models.plans.layers import become
from vllm.model_executor.parameters.placement import unwrap
from vllm.v1.attention.training.attend import attend, attend_present
from vllm.v1.attention.training.kernel import AttentionParams

from .adapter import Adapter
from .calls import AttentionCall, UnservableError, name_of_function
from .flex import resolved
from .layers import HEAD_SIZES, attends_by_vllm
from .library_attention import show_attention
from .masks import Documents, UnknownMaskError, documents_of
from .readers import READERS
from .seen import Seen, see
from .sites import Site, line_of_model, running
from .trial import SeenAttention
from .written_out import PRODUCTS
from .written_training import TrainedScores

# By mask: its documents. A model gives one mask to all of its layers.
_documents = WeakIdKeyDictionary()


def use_vllm_attention(
    module: nn.Module,
    adapter: Adapter | None = None,
    vocab_size: int | None = None,
    max_tokens: int = 59,
) -> nn.Module:
    """Have a trainer's module attend by the kernels of `TrainableAttention`.

    An engine that serves the same module as it stands attends by kernels that agree
    with these: with `VLLM_BATCH_INVARIANT=1`, and the trainer in `batch_invariant()`,
    bit by bit.

    The module is tried on a few tokens, as in an engine, and the submodules that are
    seen to attend get a subclass of their class, whose forward routes their calls. So
    they are also routed where a part of the module runs alone: in activation
    checkpointing, in FSDP's units, in compiled parts. Parameters and names stay.
    Call it before `fully_shard` and `torch.compile`, when the module has its initial
    values or its weights. A call that attends to a KV cache of the module's own is left
    as it is, and so is a module that was written with `TrainableAttention`.

    Args:
        module: Any module that vLLM serves as it stands; changed in place.
        adapter: What `register_model` is given for it.
        vocab_size: A number of token ids that the module knows. Default: what its
            config says, or the rows of its smallest embedding.
        max_tokens: The most tokens that it can be tried on.

    Returns:
        `module`

    Raises:
        UnservableError: It does something that vLLM cannot serve.
        CannotBeCalledError: It could not be called.

    """
    inner = unwrap(module)
    if adapter is None and attends_by_vllm(inner):
        return module
    parameter = next(inner.parameters())
    if parameter.is_meta:
        raise UnservableError(
            f"{type(inner).__name__} is on the meta device, where nothing can be "
            "tried. Call use_vllm_attention once it has values."
        )
    show_attention(inner, always=True)
    if vocab_size is None:
        vocab_size = _vocab_size(inner)
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            seen = see(
                inner, adapter or Adapter(), vocab_size, max_tokens, parameter.device
            )
    finally:
        inner.train(training)
    repeats: dict[str, dict[str, int]] = {}
    written: dict[str, dict[int, SeenAttention]] = {}
    for site, attention in seen.attention.items():
        if attention.scores is not None:
            _check_written_out(seen, site, attention)
            written.setdefault(site.path, {})[site.turn] = attention
            continue
        of_owner = repeats.setdefault(site.path, {})
        # Heads that stand beside themselves 4 times also do so 2 times.
        before = of_owner.get(site.function, attention.repeats)
        of_owner[site.function] = math.gcd(before, attention.repeats)
    for path in {**repeats, **written}:
        part = inner.get_submodule(path)
        if not isinstance(part, VllmAttention):
            become(
                part,
                VllmAttention,
                vllm_repeats=repeats.get(path, {}),
                vllm_written=written.get(path, {}),
            )
    return module


def _check_written_out(seen: Seen, site: Site, attention: SeenAttention) -> None:
    """Whether a forward of its submodule can tell which products are attention's.

    Raises:
        UnservableError: Another submodule computes a part of it, or other products.

    """
    assert attention.scores is not None
    prefix = f"{site.path}." if site.path else ""
    within = [p for p in seen.owners if p != site.path and p.startswith(prefix)]
    if within or attention.scores.path != site.path:
        raise UnservableError(
            f"attention is written out at {attention.line}, in a submodule with others "
            f"that are told apart by their calls ({', '.join(sorted(within))}). For "
            "equal bits call F.scaled_dot_product_attention there."
        )


def _vocab_size(module: nn.Module) -> int:
    size = getattr(getattr(module, "config", None), "vocab_size", None)
    if isinstance(size, int):
        return size
    sizes = [
        part.num_embeddings
        for part in module.modules()
        if isinstance(part, nn.Embedding)
    ]
    if not sizes:
        raise UnservableError(
            f"{type(module).__name__} has no config.vocab_size and no nn.Embedding. "
            "Say by vocab_size how many token ids it knows."
        )
    return min(sizes)


class VllmAttention(nn.Module):
    """A submodule whose forward attends, with its calls routed.

    The number of times that each function's key and value heads are repeated is in
    `vllm_repeats`, by the function's name. What is written out is in `vllm_written`, by
    the turn of its last product.
    """

    vllm_repeats: dict[str, int]
    vllm_written: dict[int, SeenAttention]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if running() is not None:  # an engine's step, or a trial
            return super().forward(*args, **kwargs)
        if self.vllm_written:
            return self._uncompiled(*args, **kwargs)
        with _TrainingAttention(self.vllm_repeats, {}):
            return super().forward(*args, **kwargs)

    @torch.compiler.disable(reason="follows written-out attention by its tensors")
    def _uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        with _TrainingAttention(self.vllm_repeats, self.vllm_written):
            return super().forward(*args, **kwargs)


class _TrainingAttention(TorchFunctionMode):
    def __init__(
        self, repeats: Mapping[str, int], written: Mapping[int, SeenAttention]
    ) -> None:
        super().__init__()
        self._repeats = repeats
        self._scores = TrainedScores(written) if written else None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._scores is not None:
            if func in PRODUCTS:
                result = self._scores.product(func, args, kwargs)
                if isinstance(result, AttentionCall):
                    return result.result(attend_in_training(result))
                return result
            pending = self._scores.among(func, args, kwargs)
            if pending is not None:
                return self._scores.follow(pending, func, args, kwargs)
        if func not in READERS:
            return func(*args, **kwargs)
        call = READERS[func](*args, **kwargs)
        if call.query.shape[-2] != call.key.shape[-2]:  # a cache of the module's own
            return func(*args, **kwargs)
        call = resolved(call)
        if call.unservable is not None:
            raise UnservableError(
                f"vLLM's training attention cannot follow it: {call.unservable}, at "
                f"{line_of_model()}"
            )
        repeats = self._repeats.get(name_of_function(func), 1)
        return call.result(attend_in_training(call, repeats))


def attend_in_training(call: AttentionCall, repeats: int = 1) -> torch.Tensor:
    """Differentiable attention of a call, by the kernels of `TrainableAttention`.

    Args:
        call: Each row of its batch is a sequence, or holds the documents that its mask
            tells apart.
        repeats: How often each of its key and value heads stands beside itself.

    Returns:
        `[batch, heads, tokens, value_dim]`

    Raises:
        UnservableError: The mask is neither causal nor a window in each document.

    """
    # [batch, tokens, heads, head_dim]
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    if repeats > 1:
        k, v = k[:, :, ::repeats], v[:, :, ::repeats]
    value_dim = v.shape[-1]
    size = _head_size(max(q.shape[-1], value_dim), q.device)
    # Zeros add nothing to the scores, nor to the output beside them.
    q, k, v = (F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
    documents = Documents(None) if call.mask is None else _documents_of(call)
    if call.mask is None and not call.causal:
        raise UnservableError(
            f"every token sees all tokens, also later ones, at {line_of_model()}. vLLM "
            "generates with causal attention only"
        )
    params = AttentionParams(
        scale=call.scale,
        causal=True,
        sliding_window=documents.window if call.window is None else call.window,
        logits_soft_cap=call.soft_cap,
        dropout=call.dropout,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        sinks=call.sinks,
    )
    if call.cu_seqlens is not None:
        cu_seqlens = call.cu_seqlens.to(torch.int32)
        out = attend(q[0], k[0], v[0], params, cu_seqlens)[None]
    elif documents.present is None or documents.cu_seqlens is None:
        out = attend(q, k, v, params)
    else:
        out = attend_present(q, k, v, params, documents.present, documents.cu_seqlens)
    return out[..., :value_dim].transpose(1, 2)


def _head_size(size: int, device: torch.device) -> int:
    """The head size with which an engine's backend computes this one."""
    if device.type != "cpu":
        return size
    of_backend = (known for known in HEAD_SIZES if known >= 32)
    return next((known for known in of_backend if known >= size), size)


@torch.compiler.disable(reason="reads the values of a mask")
def _documents_of(call: AttentionCall) -> Documents:
    mask = call.mask
    batch, _, tokens, _ = call.query.shape
    known = _documents.get(mask) if isinstance(mask, torch.Tensor) else None
    state = (getattr(mask, "_version", 0), call.causal, batch)
    if known is None or known[0] != state:
        try:
            documents = documents_of(mask, call.causal, batch, tokens)
        except UnknownMaskError as error:
            raise UnservableError(
                f"vLLM's training attention cannot follow it: {error}, at "
                f"{line_of_model()}"
            ) from None
        known = (state, documents)
        _documents[mask] = known
    return known[1]
