# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`PreviousTokens`: what the tokens before each one had, in training and serving."""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers.trainable_attention.engine_step import EngineLayer
from vllm.v1.attention.training.sequences import (
    CuSeqlens,
    Sequences,
    graph_is_dense,
    sequences_of,
)

from .cached import build_cached


class PreviousTokens(EngineLayer):
    """The values of the `tokens` tokens before each token of its sequence.

    With it, layers that have a state beside attention take one line: a token shift, a
    "smear" of the token before, or a causal convolution.

        self.previous = PreviousTokens(channels)
        shifted = self.previous(x)[:, 0]  # [tokens, channels]

        self.previous = PreviousTokens(channels, tokens=3)
        window = torch.cat([self.previous(x), x.unsqueeze(-2)], dim=-2)
        y = (window * self.weight).sum(-2)  # a convolution, weight [4, channels]

    Called in an engine step, it keeps the last tokens of each request in a cache of
    vLLM's, so chunked prefill, preemption and many requests at once work. Called
    anywhere else it is differentiable. It has no parameters. While a model has such a
    layer, vLLM's prefix cache finds nothing.

    Args:
        channels: Size of each token's values; under tensor parallelism, this rank's.
        tokens: How many tokens are looked back, at least 1.
        dtype: Of the values in the engine's cache. Default: the engine's.
        prefix: Name of the layer in the engine, with an index as the only integer.
            Default: a unique one.

    Raises:
        ValueError: An argument is out of range, or the engine decodes speculatively,
            which would have to take tokens back.
    """

    def __init__(
        self,
        channels: int,
        tokens: int = 1,
        dtype: torch.dtype | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if channels < 1 or tokens < 1:
            raise ValueError(
                f"channels and tokens must be at least 1, got {channels} and {tokens}."
            )
        self.channels = channels
        self.tokens = tokens
        # A child module, so that vLLM and our own code find it as a layer with a cache.
        self.cached = build_cached(channels, tokens, dtype, prefix)

    def forward(
        self, x: torch.Tensor, cu_seqlens: CuSeqlens | None = None
    ) -> torch.Tensor:
        """Looks back within each sequence.

        Args:
            x: Packed `[tokens, channels]`, the layout of an engine step, also with a
                batch axis of 1; or padded `[batch, seq, channels]`, each row a
                sequence that begins at 0.
            cu_seqlens: int32 `[num_seqs + 1]`, cumulative lengths of a packed batch, a
                list or an array will do. Default: as `packed_sequences` says, else all
                tokens are one sequence.

        Returns:
            `[..., tokens, channels]`, with the leading axes of `x`, the oldest token
            first: `[..., -1, :]` is the one before. Zeros before a sequence's start.

        Raises:
            ValueError: Shapes or `cu_seqlens` do not fit.
            TypeError: `cu_seqlens` cannot be made a tensor.
            RuntimeError: An engine step reaches a layer that no engine built.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.channels:
            raise ValueError(
                f"x must be [tokens, {self.channels}] or [batch, seq, {self.channels}],"
                f" got {list(x.shape)}."
            )
        if self.in_engine_step():
            return self._from_cache(x, cu_seqlens)
        if graph_is_dense(cu_seqlens):
            return _shifted(x, self.tokens)
        return self._shifted_in_sequences(x, cu_seqlens)

    @property
    def _engine_half(self) -> nn.Module | None:
        return self.cached

    def _from_cache(
        self, x: torch.Tensor, cu_seqlens: CuSeqlens | None
    ) -> torch.Tensor:
        if self.cached is None:
            raise RuntimeError(
                "This PreviousTokens cannot take part in an engine step: no engine "
                "built it. Build the model inside the callable given to "
                "ModelRegistry.register_model."
            )
        if cu_seqlens is not None:
            raise ValueError(
                "In an engine step vLLM knows the sequences: leave cu_seqlens None."
            )
        if x.dim() == 3 and x.shape[0] != 1:
            raise ValueError(
                "In an engine step all tokens are on one axis: x must be [tokens, "
                f"{self.channels}], got {list(x.shape)}."
            )
        previous = self.cached(x.reshape(-1, self.channels))
        return previous.view(*x.shape[:-1], self.tokens, self.channels)

    @torch.compiler.disable(reason="the lengths of packed sequences differ per batch")
    def _shifted_in_sequences(
        self, x: torch.Tensor, cu_seqlens: CuSeqlens | None
    ) -> torch.Tensor:
        rows, seq = (1, x.shape[0]) if x.dim() == 2 else x.shape[:2]
        sequences = sequences_of(Sequences(rows, seq), cu_seqlens)
        previous = _shifted(x, self.tokens)
        if sequences.cu_seqlens is None:
            return previous
        starts = sequences.offsets(x.device)
        index = torch.arange(seq, dtype=torch.int32, device=x.device)
        position = index - starts[torch.searchsorted(starts, index, right=True) - 1]
        ages = torch.arange(self.tokens, 0, -1, device=x.device)
        exists = position.unsqueeze(-1) >= ages  # [seq, tokens]
        return previous.where(exists.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, tokens={self.tokens}"


def _shifted(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """`x` `[..., seq, channels]` by 1 to `tokens` places, the farthest first."""
    padded = F.pad(x, (0, 0, tokens, 0))
    seq = x.shape[-2]
    return torch.stack(
        [padded[..., start : start + seq, :] for start in range(tokens)], dim=-2
    )
