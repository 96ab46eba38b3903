# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The build backend (PEP 517 and PEP 660): what `pip install .` calls.

VLLM_USE_PRECOMPILED   1 (default): upstream's compiled kernels; 0: build from source
VLLM_TARGET_DEVICE     cpu or cuda; from source, any device that upstream builds for
VLLM_UPSTREAM_VERSION  a release listed in upstream.toml

There are no prepare_metadata hooks: pip reads the metadata of the finished wheel.
"""

import sys

if sys.version_info < (3, 11):  # it could not read upstream.toml
    sys.exit("error: This Python is too old to build vLLM: use Python 3.11 or newer.")
if __name__ == "__main__":
    sys.exit("error: setup.py is not a script: run `pip install .` instead.")

from pathlib import Path
from typing import Any

from tools import compose, one_sentence, upstream

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    with one_sentence():
        upstream.check_python()
        release, device = upstream.release(), upstream.target_device()
        if not upstream.use_precompiled():
            return compose.source_requirements(release, device)
        cached = upstream.is_cached(release.wheel(device))
        return [] if cached else upstream.FETCH_REQUIREMENTS


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return get_requires_for_build_wheel()


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    with one_sentence():
        upstream.check_python()
        precompiled = upstream.use_precompiled()
        build = compose.build_wheel if precompiled else compose.build_from_source
        return build(
            Path(wheel_directory), upstream.release(), upstream.target_device()
        )


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    with one_sentence():
        upstream.check_python()
        folder = Path(wheel_directory)
        release, device = upstream.release(), upstream.target_device()
        if upstream.use_precompiled():
            return compose.build_editable(folder, release, device)
        return compose.build_from_source(folder, release, device, "build_editable")


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    with one_sentence():
        return compose.build_sdist(Path(sdist_directory), upstream.release())
