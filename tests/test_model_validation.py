# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vllm.model_validation: a right model passes, and every check can fail."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm.logprobs import FlatLogprobs, Logprob
from vllm.model_validation import (
    Thresholds,
    TokenComparison,
    ValidationReport,
    validate,
    validate_outputs,
)

VOCAB = 32
PROMPTS = [[3, 1, 4], [1, 5, 9, 2]]
MAX_TOKENS = 6


class BigramModel(nn.Module):
    """Logits of the next token depend on the last one only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(
            3 * torch.randn(VOCAB, VOCAB, generator=generator)
        )

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table(token_ids)


def serve(model: BigramModel, num_logprobs: int = VOCAB, flat: bool = True) -> list:
    """What vLLM would return for greedy requests."""

    def logprobs_at(token_ids: list[int], chosen: int) -> dict[int, Logprob]:
        row = model(torch.tensor(token_ids))[-1].log_softmax(-1)
        top = row.topk(num_logprobs).indices.tolist()
        order = row.argsort(descending=True).tolist()
        return {
            token: Logprob(row[token].item(), order.index(token) + 1)
            for token in [chosen, *top]
        }

    outputs = []
    for prompt in PROMPTS:
        of_prompt: list = [None]
        for i in range(1, len(prompt)):
            of_prompt.append(logprobs_at(prompt[:i], prompt[i]))
        sequence = list(prompt)
        generated: list = FlatLogprobs() if flat else []  # type: ignore[assignment]
        for _ in range(MAX_TOKENS):
            token = int(model(torch.tensor(sequence))[-1].argmax())
            generated.append(logprobs_at(sequence, token))
            sequence.append(token)
        completion = SimpleNamespace(
            token_ids=sequence[len(prompt) :], logprobs=generated
        )
        outputs.append(
            SimpleNamespace(
                prompt_token_ids=prompt,
                prompt_logprobs=of_prompt,
                outputs=[completion],
            )
        )
    return outputs


def failed(report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


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


@pytest.mark.parametrize("limit", ["max_logprob_diff", "mean_logprob_diff", "max_kl"])
def test_thresholds_are_kept_each_alone(model, limit):
    outputs = serve(model)
    noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
    reference = lambda ids: model(ids) + 1e-3 * noise[ids]  # noqa: E731
    loose = dict(max_logprob_diff=1.0, mean_logprob_diff=1.0, max_kl=1.0)
    assert validate_outputs(outputs, reference, MAX_TOKENS, Thresholds(**loose)).passed
    tight = Thresholds(**(loose | {limit: 1e-12}))
    assert not validate_outputs(outputs, reference, MAX_TOKENS, tight).passed


def test_lower_greedy_agreement_can_be_allowed(model):
    outputs = serve(model)
    limits = Thresholds(0.0, math.inf, math.inf, math.inf)
    assert validate_outputs(outputs, lambda x: -model(x), MAX_TOKENS, limits).passed


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


def test_json_and_table(model, tmp_path, capsys):
    report = validate_outputs(serve(model), lambda x: -model(x), MAX_TOKENS)
    report.write_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["passed"] is False
    assert written["num_generated_tokens"] == len(PROMPTS) * MAX_TOKENS
    assert {check["name"] for check in written["checks"]} >= failed(report)
    assert written["worst"][0]["rank"] == report.worst[0].rank

    report.print_table()
    table = capsys.readouterr().out
    assert "FAILED" in table and "Worst tokens" in table
    for check in report.checks:
        assert check.name in table

    validate_outputs(serve(model), model, MAX_TOKENS).print_table()
    table = capsys.readouterr().out
    assert "PASSED" in table and "Worst tokens" not in table


def test_table_shows_text_as_it_is(model, capsys):
    class Tokenizer:
        def decode(self, token_ids: list[int]) -> str:
            return f"[bold]{token_ids[0]}\n"

    report = validate_outputs(
        serve(model), lambda x: -model(x), MAX_TOKENS, tokenizer=Tokenizer()
    )
    report.print_table()
    assert f"'[bold]{report.worst[0].token_id}\\n'" in capsys.readouterr().out


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


@pytest.mark.parametrize("limit, passes", [(1e-4, True), (0.0, False)])
def test_large_log_probs_have_the_resolution_of_float32(limit, passes):
    token = TokenComparison(0, 1, 0, True, -2155.2419, -2155.2416, 1, None, True)
    report = ValidationReport(
        thresholds=Thresholds(max_logprob_diff=limit, mean_logprob_diff=limit),
        num_prompts=1,
        tokens=(token,),
        missing_tokens=0,
        kl_support="",
    )
    assert report.passed == passes
