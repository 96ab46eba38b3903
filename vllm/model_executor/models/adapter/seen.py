# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tries a module before it serves, notes what it does, and checks the notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from vllm.model_executor.models.plans.pipeline import is_run_here, run_stage
from vllm.sequence import IntermediateTensors

from .adapter import Adapter
from .call_forms import CallForm, cannot_be_called, tensor_of
from .calls import UnservableError, attend_to_self
from .full_forward import own_forms
from .head import Head, find_head
from .routing import Attend, HiddenStatesReached, Routing
from .sites import PathHooks, Running, Site, run_as
from .tables import Tables
from .trial import POSITIONS, TOKENS, Origin, SeenAttention, Trial

# Numbers of tokens that hardly any axis of a parameter has.
LENGTHS = (59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5)


@dataclass(frozen=True)
class Seen:
    """All that a served module's forward needs.

    Args:
        form: How it is called.
        attention: What each attention call asks for.
        origins: The calls whose results positions replace.
        head: From hidden states to logits; None if all tokens' results are taken.
        owners: The submodules whose calls are counted.
        gives_logits: Whether the result is as wide as the vocabulary.
        last_only: Whether the result has the last token only.

    """

    form: CallForm
    attention: dict[Site, SeenAttention]
    origins: dict[Site, Origin]
    head: Head | None
    owners: frozenset[str]
    gives_logits: bool
    last_only: bool

    def in_stage(self, module: nn.Module, is_last_stage: bool) -> Seen:
        """What of this holds in a pipeline stage, which `module` has been cut to."""

        def here(site: Site) -> bool:
            table = site.function.partition("slice of ")[2]
            paths = (site.path, table.rpartition(".")[0])
            return all(is_run_here(module, path) for path in paths)

        return replace(
            self,
            attention={s: seen for s, seen in self.attention.items() if here(s)},
            origins={s: origin for s, origin in self.origins.items() if here(s)},
            head=self.head if is_last_stage else None,
            owners=frozenset(p for p in self.owners if is_run_here(module, p)),
        )

    @property
    def scores(self) -> frozenset[Site]:
        """The products that begin the scores of attention that is written out."""
        found = {attention.scores for attention in self.attention.values()}
        return frozenset(found - {None})  # type: ignore[arg-type]

    @property
    def cut(self) -> Site | None:
        return None if self.head is None else self.head.cut


@dataclass
class _Run:
    trial: Trial
    result: torch.Tensor  # [1, tokens, width] or [tokens, width]


def see(
    module: nn.Module,
    adapter: Adapter,
    vocab_size: int,
    max_tokens: int,
    device: torch.device,
) -> Seen:
    """Try `module` on a few tokens, in each way that it may be called.

    Args:
        module: What the factory built, in eval mode, with or without its weights.
        adapter: What the user has said.
        vocab_size: Of the tokens, and the least number of logits.
        max_tokens: The most tokens that a trial may have.
        device: Where the module is.

    Raises:
        UnservableError: It does something that vLLM cannot serve.
        CannotBeCalledError: It could not be called in any way.

    """
    tables = Tables(module)
    lengths = _lengths(module, vocab_size, max_tokens)
    failures: list[tuple[CallForm, Exception]] = []
    hooks = PathHooks(module)
    try:
        for form in own_forms(module, adapter):
            try:
                runs = [
                    _run(module, form, tokens, vocab_size, tables, device)
                    for tokens in lengths
                ]
                seen = _combined(module, form, runs, lengths)
                _check_tokens_are_apart(module, seen, tables, runs[0], lengths)
                return seen
            except UnservableError as error:
                # Without a batch axis another axis may have been taken for it.
                if form.batched:
                    raise
                failures.append((form, error))
            except Exception as error:  # noqa: BLE001 - raised below, with the others
                failures.append((form, error))
    finally:
        hooks.remove()
    for _, failure in failures:
        if isinstance(failure, UnservableError):
            raise failure
    raise cannot_be_called(module, failures) from failures[0][1]


def token_ids(tokens: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Any token ids, `[tokens]`, the same ones every time."""
    index = torch.arange(tokens, device=device)
    return (index * index * 7 + index * 3 + 1) % vocab_size


def run_routed(
    module: nn.Module,
    seen: Seen,
    attention: Mapping[Site, Attend],
    tables: Tables,
    inputs: torch.Tensor,
    positions: torch.Tensor,
    received: IntermediateTensors | None = None,
) -> torch.Tensor | IntermediateTensors:
    """Hidden states, or logits where no head is known, `[tokens, width]`.

    `inputs` are token ids `[tokens]`, or embeddings `[tokens, hidden]`. The module has
    `PathHooks` on `seen.owners`, or on all submodules. A pipeline stage takes what it
    received, and returns what the next one takes.
    """
    if positions.dim() > 1 and (seen.origins or seen.form.positions is None):
        raise UnservableError(
            f"{type(module).__name__} gets positions of several axes "
            f"{list(positions.shape)}, but makes positions itself; expected that it "
            "takes all of them as an argument named position_ids"
        )
    forward = Running(wants_masks=False)
    routing = Routing(
        forward, positions, attention, seen.origins, tables, seen.cut, seen.scores
    )
    try:
        with run_as(forward), routing:
            result = run_stage(
                module, received, lambda: seen.form(module, inputs, positions)
            )
    except HiddenStatesReached as reached:
        result = reached.hidden_states
    if isinstance(result, IntermediateTensors):
        return result
    return tensor_of(result).flatten(0, -2)


def _lengths(module: nn.Module, vocab_size: int, max_tokens: int) -> tuple[int, int]:
    taken = {vocab_size}
    for tensor in (*module.parameters(), *module.buffers()):
        taken.update(tensor.shape)
    free = [n for n in LENGTHS if n not in taken and n <= max_tokens]
    if len(free) < 2:
        raise UnservableError(
            f"a trial needs two numbers of tokens up to {max_tokens} that no axis of a "
            "parameter has; raise max_model_len"
        )
    return free[0], free[1]


def _run(
    module: nn.Module,
    form: CallForm,
    tokens: int,
    vocab_size: int,
    tables: Tables,
    device: torch.device,
) -> _Run:
    forward = Running(wants_masks=True)
    trial = Trial(forward, tokens, vocab_size, tables)
    input_ids = token_ids(tokens, vocab_size, device)
    positions = torch.arange(tokens, device=device)
    with run_as(forward), trial:
        trial.mark(input_ids, positions)
        output = form(module, input_ids, positions)
    result = tensor_of(output)
    shape = list(result.shape)
    if form.batched and result.dim() == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or shape[0] not in (1, tokens):
        raise TypeError(
            f"it returned a tensor of shape {list(result.shape)} for {tokens} tokens; "
            f"expected [{'1, ' if form.batched else ''}{tokens}, vocab or hidden]"
        )
    return _Run(trial, result)


def _combined(
    module: nn.Module, form: CallForm, runs: list[_Run], lengths: tuple[int, int]
) -> Seen:
    """What holds in both trials.

    Raises:
        UnservableError: Something differs with the number of tokens.

    """
    trials = [run.trial for run in runs]
    head = None
    calls = [trial.head for trial in trials]
    if calls[0] is not None and calls[1] is not None:
        results = (runs[0].result, runs[1].result)
        head = find_head(module, (calls[0], calls[1]), results)
    last_only = runs[0].result.shape[-2] != lengths[0]
    if last_only and (head is None or head.selected is None):
        raise UnservableError(
            "its result has one token, and where its hidden states are is not seen. "
            "Say so by register_model(..., adapter=Adapter(forward=...)), which "
            "returns logits of all tokens"
        )
    return Seen(
        form=form,
        attention=_attention_of_both(*(trial.attention for trial in trials)),
        origins=_origins_of_both(runs),
        head=head,
        owners=frozenset(trials[0].owners),
        gives_logits=runs[0].result.shape[-1] >= trials[0].vocab_size,
        last_only=last_only,
    )


def _attention_of_both(
    first: dict[Site, SeenAttention], second: dict[Site, SeenAttention]
) -> dict[Site, SeenAttention]:
    if first.keys() != second.keys():
        site = next(iter(first.keys() ^ second.keys()))
        line = (first.get(site) or second[site]).line
        raise UnservableError(
            f"{site} is called for one number of tokens and not for another, at {line}"
        )
    both = {}
    for site, one in first.items():
        other = second[site]
        # A window is not seen in fewer tokens than it has.
        window = other.window if one.window is None else one.window
        repeats = min(one.repeats, other.repeats)
        one, other = (
            replace(
                seen,
                window=window,
                repeats=repeats,
                kv_heads=seen.kv_heads * seen.repeats // repeats,
            )
            for seen in (one, other)
        )
        if one != other:
            raise UnservableError(
                f"{site} depends on the number of tokens: {one} and {other}"
            )
        both[site] = one
    return both


def _origins_of_both(runs: list[_Run]) -> dict[Site, Origin]:
    """The origins that the result depends on."""
    found = []
    for run in runs:
        sites = run.trial.origins_of(run.result) - {TOKENS, POSITIONS}
        found.append({site: run.trial.origins[site] for site in sites})
    first, second = found
    for site in (*first, *second):
        one, other = first.get(site), second.get(site)
        if one is None or one != other or one.kind == "other":
            line = (one or second[site]).line
            raise UnservableError(
                "the result depends on the number of tokens, or on their index in the "
                f"call, by {line}. In an engine step a token's place is told by "
                "positions: take them as an argument named position_ids, or make them "
                "by torch.arange(tokens) or table[:tokens]"
            )
    return first


def _check_tokens_are_apart(
    module: nn.Module,
    seen: Seen,
    tables: Tables,
    run: _Run,
    lengths: tuple[int, int],
) -> None:
    """Check that without attention no token's result depends on other tokens.

    Raises:
        UnservableError: Some token's result does.

    """
    device = run.result.device
    tokens, fewer = lengths
    head = run.trial.head if seen.head is not None else None
    alone = run.result if head is None else head.hidden_states
    alone = alone.flatten(0, -2)  # [tokens, width]
    # Some of the same tokens with their positions, in another order.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(tokens, generator=generator, device="cpu")[:fewer].to(device)
    ids = token_ids(tokens, run.trial.vocab_size, device)[order]
    attention = dict.fromkeys(seen.attention, attend_to_self)
    routed = run_routed(module, seen, attention, tables, ids, order)
    assert isinstance(routed, torch.Tensor)  # it is not cut yet
    expected = alone[order]
    if routed.shape != expected.shape:
        raise UnservableError(
            f"its result has shape {list(routed.shape)}; expected "
            f"{list(expected.shape)}"
        )
    distance = (routed.float() - expected.float()).abs().amax(-1)
    rounding = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    bound = rounding * expected.float().abs().amax()
    # By rounding, a router may choose other experts for a few tokens.
    if int((distance > bound).sum()) * 4 > fewer:
        raise UnservableError(
            "tokens depend on other tokens outside attention, as by a convolution, a "
            "shift or a recurrent state, or on their number. vLLM would not know the "
            "tokens of earlier steps"
        )
