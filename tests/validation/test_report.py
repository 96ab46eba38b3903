# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A report: its limits, its table and its JSON."""

import json
import math

import pytest
import torch
from bigram_model import MAX_TOKENS, PROMPTS, VOCAB, BigramModel, failed, serve

from vllm.validation.compare import validate_outputs
from vllm.validation.report import Thresholds, TokenComparison, ValidationReport


@pytest.fixture
def model() -> BigramModel:
    return BigramModel()


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
