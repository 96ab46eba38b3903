# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The programs of docs/way_here run as a reader would run them, on random weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from generic.tink_server import TinkServer  # noqa: F401
