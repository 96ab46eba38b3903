# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Builds the distribution `vllm` out of upstream's release and this repository.

`python -m tools --help` is the command line; `setup.py` is the packaging side.
"""

from __future__ import annotations  # older Pythons get as far as the sentence

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout of this repository."""


class BuildError(Exception):
    """What went wrong and how to repair it, in a sentence for the person building."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Exit with the sentence of a BuildError, or of a full disk, and no traceback."""
    try:
        yield
    except BuildError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        sys.exit(f"error: The disk is full{place}: make room and run this again.")
