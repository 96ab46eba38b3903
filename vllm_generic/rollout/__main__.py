# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m vllm_generic.rollout` prints the keys of a rollout's YAML file."""

import sys

from vllm_generic.rollout.config import defaults

if __name__ == "__main__":
    sys.stdout.write(defaults())
