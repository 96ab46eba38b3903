# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the tokens before had: in training, in a cache, and in an engine."""

import importlib
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_model import HEADS, HIDDEN, LAYERS, VOCAB, TinyModel
from torch import nn

from vllm import LLM, ModelRegistry
from vllm.model_executor.layers import TrainableFlashAttention
from vllm.model_executor.layers.previous_tokens import PreviousTokens
from vllm.model_executor.layers.previous_tokens.cached import (
    CachedPreviousTokens,
    PreviousTokensMetadata,
)
from vllm.model_validation import Thresholds, validate
from vllm.v1.attention.training.sequences import packed_sequences
from vllm.v1.core.uncached_states import disable_prefix_caching_of_states
from vllm.v1.kv_cache_interface import FullAttentionSpec

CHANNELS = 3


def by_hand(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """`[seq, tokens, channels]` of one sequence `[seq, channels]`."""
    return torch.stack(
        [
            torch.stack(
                [
                    x[index - age] if index >= age else torch.zeros_like(x[0])
                    for age in range(tokens, 0, -1)
                ]
            )
            for index in range(len(x))
        ]
    )


# ---- Training ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_layout_looks_back_within_its_sequence(tokens):
    layer = PreviousTokens(CHANNELS, tokens)
    lengths = [5, 1, 2, 4]
    cu_seqlens = [0, *accumulate(lengths)]
    x = torch.randn(sum(lengths), CHANNELS)
    expected = torch.cat([by_hand(part, tokens) for part in x.split(lengths)])
    assert layer(x, cu_seqlens).equal(expected)
    assert layer(x.unsqueeze(0), cu_seqlens).equal(expected.unsqueeze(0))
    with packed_sequences(cu_seqlens):
        assert layer(x).equal(expected)
    assert layer(x).equal(by_hand(x, tokens))  # one sequence
    rows = x.view(3, 4, CHANNELS)
    assert layer(rows).equal(torch.stack([by_hand(row, tokens) for row in rows]))
    assert not list(layer.state_dict())


def test_it_is_differentiable():
    layer = PreviousTokens(CHANNELS, 2)
    x = torch.randn(6, CHANNELS, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: layer(x, [0, 1, 4, 6]), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(layer(x))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: PreviousTokens(0),
            "channels and tokens must be at least 1, got 0",
        ),
        (lambda: PreviousTokens(3, 0), "must be at least 1, got 3 and 0"),
        (lambda: PreviousTokens(3)(torch.ones(2, 4)), r"must be \[tokens, 3\] or"),
        (
            lambda: PreviousTokens(3)(torch.ones(2, 3), [0, 3]),
            "cu_seqlens ends at 3, but the packed batch has 2 tokens",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- The cache -----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_chunks_of_many_requests_equal_their_sequences(tokens):
    """In any order and of any length, on blocks that others have used before."""
    generator = torch.Generator().manual_seed(0)
    cached = CachedPreviousTokens(CHANNELS, tokens, torch.float32, "previous_tokens.0")
    cached.kv_cache = (torch.full((9, tokens, CHANNELS), torch.nan),)
    lengths = [1, 17, 9, 30]
    x = [torch.randn(length, CHANNELS, generator=generator) for length in lengths]
    blocks = torch.tensor([5, 2, 8, 3], dtype=torch.int32)
    done = [0] * len(lengths)
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    while done != lengths:
        step = [
            (request, min(done[request] + chunk, lengths[request]))
            for request in torch.randperm(len(lengths), generator=generator).tolist()
            if (chunk := int(torch.randint(0, 5, (), generator=generator)))
            and done[request] < lengths[request]
        ]
        if not step:
            continue
        chunks = [x[request][done[request] : end] for request, end in step]
        sizes = [len(chunk) for chunk in chunks]
        # A padded request and three padded tokens, as in a CUDA graph.
        starts = torch.tensor([0, *accumulate(sizes), sum(sizes)], dtype=torch.int32)
        ends = torch.tensor([*(end for _, end in step), 0], dtype=torch.int32)
        rows = [*(int(blocks[request]) for request, _ in step), -1]
        metadata = PreviousTokensMetadata(starts, ends, torch.tensor(rows))
        batch = torch.cat([*chunks, torch.full((3, CHANNELS), 7.0)])
        out = cached.look_back(batch, metadata)[: sum(sizes)].split(sizes)
        for (request, end), part in zip(step, out, strict=True):
            found[request].append(part)
            done[request] = end
    for request, sequence in enumerate(x):
        assert torch.cat(found[request]).equal(by_hand(sequence, tokens))


def test_prefix_caching_is_turned_off_beside_it():
    def config() -> SimpleNamespace:
        return SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=True, block_size=16),
            model_config=SimpleNamespace(max_model_len=100),
        )

    attention = FullAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    cached = CachedPreviousTokens(CHANNELS, 1, torch.float32, "previous_tokens.0")
    spec = cached.get_kv_cache_spec(config())
    assert spec.block_size == 112  # one block for each request, which is never full
    for specs, enabled in [
        ([{"a": attention}], True),
        ([{"a": attention}, {"a": attention, "b": spec}], False),
    ]:
        vllm_config = config()
        disable_prefix_caching_of_states(vllm_config, specs)
        assert vllm_config.cache_config.enable_prefix_caching is enabled


# ---- In an engine --------------------------------------------------------------------


class SmearAndConvolutions(TinyModel):
    """A gated look at the token before, and a causal convolution before each block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 1, bias=False)
        self.smear = PreviousTokens(HIDDEN)
        self.kernels = nn.ParameterList(torch.zeros(4, HIDDEN) for _ in range(LAYERS))
        self.windows = nn.ModuleList(PreviousTokens(HIDDEN, 3) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        x = x + self.gate(x).sigmoid() * self.smear(x)[..., 0, :]
        x = x + self.positions(positions)
        for layer, kernel, window in zip(
            self.layers, self.kernels, self.windows, strict=True
        ):
            values = torch.cat([window(x), x.unsqueeze(-2)], dim=-2)
            x = layer(x + (values * kernel).sum(-2))
        return x


class CalledTwice(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.previous = PreviousTokens(HIDDEN)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = super().forward(input_ids, positions)
        return x + self.previous(x)[:, 0] + self.previous(2 * x)[:, 0]


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


PROMPTS = [
    [1, 2, 3],
    [(7 * i * i + 3) % 120 for i in range(70)],
    [(13 * i + 5) % 120 for i in range(40)],
    [9] * 11,
    [(5 * i * i + 1) % 120 for i in range(60)],
]


@pytest.mark.engine
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"enforce_eager": False}, marks=pytest.mark.slow)]
)
def test_served_as_trained(
    start: Callable[..., LLM],
    model_dir: Path,
    options: dict,
) -> None:
    model = randomize(SmearAndConvolutions())
    save_file(model.state_dict(), model_dir / "model.safetensors")
    ModelRegistry.register_model("TinyModel", lambda c, p: SmearAndConvolutions())
    # Chunks of 16 tokens; five requests do not fit at once, and some are preempted.
    llm = start(
        max_logprobs=-1,
        max_num_batched_tokens=16,
        max_num_seqs=5,
        block_size=32,
        num_gpu_blocks_override=14,
        disable_log_stats=False,
        **options,
    )

    def reference(ids: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model(ids, torch.arange(len(ids))))

    # The second time a prefix cache would have the prompt.
    for prompts, tokens in [(PROMPTS, 24), (PROMPTS[1:2], 2)]:
        report = validate(llm, reference, prompts, max_tokens=tokens)
        assert report.exit_code == 0
        assert max(token.logprob_diff for token in report.tokens) <= 1e-5
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:num_preemptions"].value > 0
    assert metrics["vllm:prefix_cache_hits"].value == 0


@pytest.mark.engine
def test_one_layer_is_called_once(start: Callable[..., LLM], model_dir: Path) -> None:
    save_file(CalledTwice().state_dict(), model_dir / "model.safetensors")
    ModelRegistry.register_model("TinyModel", lambda config, context: CalledTwice())
    with pytest.raises(ValueError, match="'previous.cached' is called 2 times in one"):
        start()


@pytest.mark.engine
@pytest.mark.gpu
def test_served_in_cuda_graphs(start: Callable[..., LLM], model_dir: Path) -> None:
    """Graphs of decode steps look back in the same buffers."""
    model = randomize(SmearAndConvolutions()).to(torch.bfloat16)
    save_file(model.state_dict(), model_dir / "model.safetensors")
    ModelRegistry.register_model("TinyModel", lambda c, p: SmearAndConvolutions())
    llm = start(max_logprobs=-1, dtype="bfloat16", enforce_eager=False)

    def reference(ids: torch.Tensor) -> torch.Tensor:
        hidden_states = model.cpu()(ids.cpu(), torch.arange(len(ids), device="cpu"))
        return model.lm_head(hidden_states)

    thresholds = Thresholds(0.9, 0.5, 0.05, 0.1)
    report = validate(llm, reference, PROMPTS, max_tokens=24, thresholds=thresholds)
    assert report.exit_code == 0, report.checks


class TrainedConvolution(nn.Module):
    """What a trainer has in the place of vLLM's ShortConv, with the same names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, width, groups=HIDDEN, bias=False)
        self.in_proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, after, x = self.in_proj(x).chunk(3, dim=-1)  # [tokens, channels]
        padded = F.pad((before * x).T, (self.conv.kernel_size[0] - 1, 0))
        return self.out_proj(after * self.conv(padded).T)


class TrainedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.conv = TrainedConvolution(width=4)
        self.attention = TrainableFlashAttention(HIDDEN, HEADS, rope_theta=10000.0)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        x = x + self.conv(x)
        return self.lm_head(x + self.attention(x))


@pytest.mark.engine
def test_vllms_own_layer_with_a_state_in_a_factory(
    start: Callable[..., LLM], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/models/state.md."""
    page = Path(__file__).parents[3] / "docs/models/state.md"
    (code,) = re.findall(
        r'^```python title="short_conv.py"\n(.*?)^```', page.read_text(), re.M | re.S
    )
    (model_dir / "short_conv.py").write_text(code)
    monkeypatch.syspath_prepend(model_dir)
    reference = randomize(TrainedModel())
    save_file(reference.state_dict(), model_dir / "model.safetensors")
    build = importlib.import_module("short_conv").build
    ModelRegistry.register_model("TinyModel", build)
    llm = start(max_logprobs=-1, max_num_batched_tokens=128, max_num_seqs=3)
    report = validate(llm, reference, PROMPTS, max_tokens=16)
    assert report.exit_code == 0
