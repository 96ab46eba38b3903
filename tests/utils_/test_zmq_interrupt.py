# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pytest
import zmq

from vllm.utils.network_utils import zmq_socket_ctx


def test_ctrl_c_is_raised_and_the_socket_closed(tmp_path):
    address = f"ipc://{tmp_path}/socket"
    with (
        pytest.raises(KeyboardInterrupt),
        zmq_socket_ctx(address, zmq.ROUTER, bind=True) as socket,
    ):
        raise KeyboardInterrupt
    assert socket.closed
