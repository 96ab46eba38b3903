# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The page of curves, in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tink_client import TEXT, datum, train, training
from tink_server import TinkServer

pytest.importorskip("websockets")

from browser import Page, find_browser, wait_for  # noqa: E402

# title of each picture -> number of points of each of its lines
PICTURES = """
Object.fromEntries([...document.querySelectorAll("figure")].map(figure => [
  figure.querySelector("figcaption").firstChild.textContent,
  [...figure.querySelectorAll("polyline")].map(
    line => line.getAttribute("points").split(" ").length)
]))
"""
# the heights of the points of the one line of a picture, from its top
HEIGHTS = """
[...document.querySelectorAll("figure")].find(
  figure => figure.querySelector("figcaption").firstChild.textContent === "%s"
).querySelector("polyline").getAttribute("points").split(" ").map(
  point => Number(point.split(",")[1]))
"""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = Page(browser, tmp_path)
    yield page
    page.close()


def test_curves_grow_while_a_run_trains(page: Page, tmp_path: Path) -> None:
    """Without a reload; nothing comes from elsewhere; a wrong key is said."""
    key = {"X-API-Key": "tml-ann"}
    with TinkServer(tmp_path / "state", "--api-key", "ann=tml-ann") as server:
        client = training(server.client("tml-ann"))

        def report(rewards: list[float]) -> None:
            for reward in rewards:
                train(client, 1, [datum(TEXT)])
                url = f"{server.url}/api/v1/history/{client.model_id}"
                httpx.post(url, json={"reward": reward}, headers=key)

        def shown() -> Any:
            return page.value(PICTURES)

        def enter(text: str) -> None:
            page.value(
                f"get('key').value = '{text}'; get('key').dispatchEvent"
                "(new Event('change'))"
            )

        report([0.0, 0.5, 0.25])
        page.open(server.url)
        enter("tml-wrong")
        error = "document.getElementById('error').textContent"
        wait_for(lambda: page.value(error), 30)
        assert shown() == {}
        enter("tml-ann")
        wait_for(shown, 30)
        assert shown() == {"loss": [3], "reward": [3], "grad_norm": [3]}
        assert page.value(error) == ""
        first, second, third = page.value(HEIGHTS % "reward")
        assert first > third > second > 0  # more is nearer to the top
        report([1.0, 1.0])
        wait_for(lambda: shown() == dict.fromkeys(shown(), [5]), 30)
        losses = page.value(HEIGHTS % "loss")
        assert losses == sorted(losses)  # it falls
        assert "train:0" in page.value("document.getElementById('runs').textContent")
        others = [url for url in page.requested if not url.startswith(server.url)]
        assert page.requested and others == []
