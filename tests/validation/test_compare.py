# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A served model against its reference: an equal one passes, each check can fail."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from bigram_model import MAX_TOKENS, PROMPTS, VOCAB, BigramModel, failed, serve

from vllm.logprobs import Logprob
from vllm.validation.compare import validate, validate_outputs
from vllm.validation.report import Thresholds


@pytest.fixture
def model() -> BigramModel:
    return BigramModel()


@pytest.mark.parametrize("flat", [True, False])
def test_equal_models_pass(model, flat):
    report = validate_outputs(serve(model, flat=flat), model, MAX_TOKENS)
    assert report.passed and report.exit_code == 0 and not failed(report)
    assert len(report.generated) == len(PROMPTS) * MAX_TOKENS
    assert len(report.prompt_tokens) == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert report.rank_histogram == {1: len(PROMPTS) * MAX_TOKENS}
    assert report.kl_support == "the whole vocabulary"


def test_every_number_against_a_direct_computation(model):
    outputs = serve(model)
    noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
    reference = lambda ids: model(ids) + 0.5 * noise[ids]  # noqa: E731
    report = validate_outputs(outputs, reference, MAX_TOKENS)

    diffs, kls, agree, ranks = [], [], 0, []
    for output in outputs:
        sequence = output.prompt_token_ids + output.outputs[0].token_ids
        for i in range(len(output.prompt_token_ids), len(sequence)):
            p = model(torch.tensor(sequence))[i - 1].double().log_softmax(-1)
            q = reference(torch.tensor(sequence))[i - 1].double().log_softmax(-1)
            diffs.append(abs(p[sequence[i]] - q[sequence[i]]).item())
            kls.append((p.exp() * (p - q)).sum().item())
            agree += int(q.argmax()) == sequence[i]
            ranks.append(q.argsort(descending=True).tolist().index(sequence[i]) + 1)
    values = {check.name: check.value for check in report.checks}
    assert values["max |Δ log p|"] == pytest.approx(max(diffs), rel=1e-5)
    assert values["mean |Δ log p|"] == pytest.approx(sum(diffs) / len(diffs), rel=1e-5)
    assert values["max KL"] == pytest.approx(max(kls), rel=1e-4)
    assert values["greedy agreement"] == agree / len(ranks) < 1
    assert report.rank_histogram == {r: ranks.count(r) for r in sorted(set(ranks))}


def test_every_check_fails_a_model_that_differs(model):
    outputs = serve(model)
    report = validate_outputs(outputs, lambda ids: -model(ids), MAX_TOKENS)
    assert report.exit_code == 1
    assert failed(report) == {
        "greedy agreement",
        "max |Δ log p|",
        "mean |Δ log p|",
        "max KL",
        "prompt max |Δ log p|",
        "prompt mean |Δ log p|",
    }


def test_one_wrong_token_fails_and_is_named(model):
    outputs = serve(model)
    where = len(PROMPTS[1]) + 2

    def reference(token_ids: torch.Tensor) -> torch.Tensor:
        logits = model(token_ids).clone()
        if token_ids[: len(PROMPTS[1])].tolist() == PROMPTS[1]:
            logits[where - 1, token_ids[where]] -= 50.0
        return logits

    report = validate_outputs(outputs, reference, MAX_TOKENS)
    assert "greedy agreement" in failed(report)
    worst = report.worst[0]
    assert (worst.prompt, worst.position) == (1, where)
    assert worst.rank == VOCAB and not worst.agrees
    assert worst.logprob_diff > 40


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_reference_fails(model, value):
    def reference(token_ids: torch.Tensor) -> torch.Tensor:
        logits = model(token_ids).clone()
        logits[-2, 7] = value
        return logits

    unlimited = Thresholds(0.0, math.inf, math.inf, math.inf)
    report = validate_outputs(serve(model), reference, MAX_TOKENS, unlimited)
    assert not report.passed
    assert "tokens with NaN or infinity" in failed(report)
    assert not report.worst[0].finite
    json.loads(report.to_json())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["generated", "prompt"])
def test_non_finite_served_logprob_fails(model, where, value):
    outputs = serve(model, flat=False)
    logprobs = outputs[0].outputs[0].logprobs
    token = outputs[0].outputs[0].token_ids[1]
    if where == "prompt":
        logprobs, token = outputs[0].prompt_logprobs, PROMPTS[0][1]
    logprobs[1][token].logprob = value
    unlimited = Thresholds(0.0, math.inf, math.inf, math.inf)
    report = validate_outputs(outputs, model, MAX_TOKENS, unlimited)
    assert failed(report) >= {"tokens with NaN or infinity"}


def drop_last_token(completion) -> None:
    completion.token_ids = completion.token_ids[:-1]


def drop_last_logprob(completion) -> None:
    completion.logprobs = completion.logprobs[:-1]


def drop_all_logprobs(completion) -> None:
    completion.logprobs = None


@pytest.mark.parametrize(
    ("drop", "missing"),
    [(drop_last_token, 1), (drop_last_logprob, 1), (drop_all_logprobs, MAX_TOKENS)],
)
def test_missing_tokens_fail(model, drop, missing):
    outputs = serve(model)
    drop(outputs[1].outputs[0])
    report = validate_outputs(outputs, model, MAX_TOKENS)
    assert failed(report) == {"missing tokens"}
    assert report.missing_tokens == missing


def test_nothing_served_fails(model):
    assert validate_outputs([], model, MAX_TOKENS).exit_code == 1
    for prompts, max_tokens in ([], 4), ([[1]], 0):
        with pytest.raises(ValueError, match="Nothing to validate"):
            validate(None, model, prompts, max_tokens)  # type: ignore[arg-type]


def test_top_logprobs_give_a_labelled_kl(model):
    report = validate_outputs(serve(model, num_logprobs=5), model, MAX_TOKENS)
    assert report.passed
    assert report.kl_support.startswith("the 5 tokens")

    shifted = lambda ids: 1.1 * model(ids)  # noqa: E731
    report = validate_outputs(serve(model, num_logprobs=5), shifted, MAX_TOKENS)
    assert "max KL" in failed(report)

    report = validate_outputs(serve(model, num_logprobs=0), model, MAX_TOKENS)
    assert report.passed
    assert "max KL" not in {check.name for check in report.checks}


def test_masked_vocabulary_is_not_an_error(model):
    class Masked(BigramModel):
        def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(token_ids).clone()
            logits[:, VOCAB - 2 :] = -math.inf
            return logits

    assert validate_outputs(serve(Masked()), Masked(), MAX_TOKENS).passed
    # but weight where the reference has none is
    assert not validate_outputs(serve(model), Masked(), MAX_TOKENS).passed


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logits: logits[None],
        lambda logits: logits[-1],
        lambda logits: logits[:-1],
        lambda logits: logits[:, :4],
    ],
)
def test_wrong_reference_shape_is_an_error(model, wrong):
    with pytest.raises(ValueError, match="The reference returned logits of shape"):
        validate_outputs(serve(model), lambda ids: wrong(model(ids)), MAX_TOKENS)


@pytest.mark.engine
def test_served_model(start, model_dir):
    """Against an engine: equal, then with one weight of the reference changed."""
    from safetensors.torch import save_file
    from tiny_model import TinyModel, full_sequence_logits, trained_model

    from vllm import ModelRegistry

    model = trained_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3  # well-conditioned: these thresholds are for rounding
    save_file(model.state_dict(), model_dir / "model.safetensors")
    ModelRegistry.register_model("TinyModel", lambda config, context: TinyModel())
    llm = start(max_logprobs=-1)

    def reference(token_ids: torch.Tensor) -> torch.Tensor:
        return full_sequence_logits(model, token_ids.tolist())

    prompts = [list(range(first, first + 20)) for first in (1, 30, 70)]
    report = validate(llm, reference, prompts, max_tokens=16)
    assert report.passed, report.to_json()
    assert report.kl_support == "the whole vocabulary"
    assert len(report.generated) == 3 * 16 and len(report.prompt_tokens) == 3 * 19

    # more tokens than fit the context cannot all be served
    too_many = validate(llm, reference, prompts, max_tokens=120)
    assert failed(too_many) == {"missing tokens"}

    with torch.no_grad():
        model.layers[1].projection.bias[0] += 0.01
    assert validate(llm, reference, prompts, max_tokens=16).exit_code == 1


@pytest.mark.parametrize("masked_prompt", [False, True])
def test_masked_ids_agree(masked_prompt):
    """Both sides give -inf to ids that are no tokens, maybe to one of the prompt."""
    masked = torch.arange(VOCAB) >= VOCAB - 4
    logits = torch.randn(VOCAB).masked_fill(masked, -math.inf)
    log_probs = logits.log_softmax(-1)
    token = int(logits.argmax())
    served = {
        i: Logprob(logprob=p, rank=1, decoded_token=None)
        for i, p in enumerate(log_probs.tolist())
    }
    prompt = [0, VOCAB - 1 if masked_prompt else 1]
    output = SimpleNamespace(
        prompt_token_ids=prompt,
        prompt_logprobs=[None, served],
        outputs=[SimpleNamespace(token_ids=[token], logprobs=[served])],
    )
    report = validate_outputs(
        [output], lambda ids: logits.expand(len(ids), VOCAB), max_tokens=1
    )
    assert report.passed, report.checks
    assert all(token.logprob_diff < 1e-5 for token in report.tokens)
    # One that is masked on one side only does not agree.
    served[VOCAB - 1] = Logprob(logprob=-3.0, rank=1, decoded_token=None)
    report = validate_outputs(
        [output], lambda ids: logits.expand(len(ids), VOCAB), max_tokens=1
    )
    assert not report.passed
