# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from collections.abc import Iterator
from typing import Any

import pytest
from tink_server import TinkServer

pytest.importorskip("tinker")


@pytest.fixture(scope="session", autouse=True)
def quiet_client() -> Iterator[None]:
    """The client reports to the service it talks to; here to nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinkServer]:
    """One service for all tests that do not restart it."""
    with TinkServer(tmp_path_factory.mktemp("tink") / "state") as running:
        yield running


@pytest.fixture(scope="session")
def service(server: TinkServer) -> Any:
    """A client of it."""
    return server.client()
