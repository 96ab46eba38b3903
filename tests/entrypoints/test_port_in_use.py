# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import socket

import pytest

from vllm.entrypoints.launchers.launcher import create_server_socket


def test_the_error_names_the_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError) as raised:
            create_server_socket(("127.0.0.1", port), reuse_port=False)
    (note,) = raised.value.__notes__
    assert note == f"Cannot listen on 127.0.0.1:{port}: choose another --port."
