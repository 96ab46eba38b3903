# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import threading

import pytest

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue


def test_a_writer_on_a_full_ring_notices_a_shutdown():
    writer = MessageQueue(1, 1, max_chunks=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    for queue in (writer, reader):
        queue.wait_until_ready()
    writer.enqueue("nobody reads it")
    threading.Timer(0.1, writer.shutdown).start()
    # the limit is for a vLLM that does not notice
    with pytest.raises(RuntimeError, match="cancelled"):
        writer.enqueue("there is no room for it", timeout=60)
