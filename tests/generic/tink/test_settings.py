# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The environment of a service."""

import pytest

from vllm_generic.tink.settings import default_port, vllm_urls


@pytest.mark.parametrize(
    ("value", "urls", "port"),
    [
        ("", [], 8000),
        ("http://localhost:8000", ["http://localhost:8000"], 8001),
        (
            "http://127.0.0.1:8000, http://[::1]:8001/,",
            ["http://127.0.0.1:8000", "http://[::1]:8001/"],
            8002,
        ),
        ("http://gpu1:8000", ["http://gpu1:8000"], 8000),
    ],
)
def test_another_port_than_vllm_has(
    value: str, urls: list[str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", value)
    assert vllm_urls() == urls
    assert default_port() == port
