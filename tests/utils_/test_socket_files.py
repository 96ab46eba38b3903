# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import gc
import os
from multiprocessing.util import get_temp_dir
from pathlib import Path

import zmq

from vllm.utils.network_utils import get_open_zmq_ipc_path, make_zmq_socket


def test_sockets_lie_where_multiprocessing_removes_them(monkeypatch):
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    path = get_open_zmq_ipc_path().removeprefix("ipc://")
    assert os.path.dirname(path) == get_temp_dir()


def test_the_user_may_name_a_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    path = get_open_zmq_ipc_path().removeprefix("ipc://")
    assert os.path.dirname(path) == str(tmp_path)


def test_the_file_goes_with_the_socket(tmp_path):
    path = Path(tmp_path, "socket")
    context = zmq.Context()
    socket = make_zmq_socket(context, f"ipc://{path}", zmq.PULL, bind=True)
    assert path.exists()
    socket.close(linger=0)
    del socket
    gc.collect()
    assert not path.exists()
    context.term()
