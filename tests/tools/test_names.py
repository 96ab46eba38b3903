# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The names of vLLM that our modules use, looked up in its sources."""

import pytest

from tools import BuildError, names, private_names

LIBRARY = {
    "vllm/__init__.py": "LAZY = {'LLM': '.llm'}\ndef __getattr__(name): ...\n",
    "vllm/config.py": (
        "from enum import Enum\n"
        "class Base:\n    size: int\n"
        "class Config(Base):\n"
        "    def __init__(self): self.width = 1\n"
        "class Level(Enum):\n    LOW = 1\n"
        "def load(path, *, strict=True): ...\n"
    ),
    "vllm/layers/__init__.py": (
        "from .linear import *\nfrom .linear import Linear as L\n"
    ),
    "vllm/layers/linear.py": (
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
        "class Linear(fast.Module):\n    weight = None\n"
        "def setup():\n    global _state\n    _state = 1\n"
    ),
}


def check(repository, module: str) -> int:
    path = repository.write("vllm/callables.py", module)
    contents = {name: text.encode() for name, text in LIBRARY.items()}
    return names.check_names(
        contents | {"vllm/callables.py": path.read_bytes()}, "1.2.3"
    )


@pytest.mark.parametrize(
    "module",
    [
        "from vllm import LLM, config, layers",
        "import vllm.config as c\nc.load('x', strict=False)\nc.Config.width",
        "from vllm.layers import Linear, L, linear",
        "from .layers.linear import fast, _state",
        "from vllm.config import Config\ndef f(c: Config): return c.size, c.width",
        "from vllm.config import Config\ndef f(c: 'Config', d): return d.lost",
        "from vllm.config import Level\nLevel.LOW.value, Level.__members__",
        # a class whose base is another project's may have anything
        "from vllm.layers import Linear\ndef f(m: Linear): m.anything",
        # what is assigned again has no known type
        "from vllm.config import Config\ndef f(c: Config):\n    c = g(c)\n    c.lost",
        "from vllm.config import Config\ndef f(c: Config): hasattr(c, 'x'); c.x",
        "try:\n    from vllm.config import lost\nexcept ImportError:\n    lost = None",
        "import contextlib\nwith contextlib.suppress(ImportError):\n    import vllm.x",
    ],
)
def test_names_that_are_there(repository, module):
    assert check(repository, module) > 0


@pytest.mark.parametrize(
    ("module", "lost"),
    [
        ("from vllm.config import lost", "1: vllm.config.lost"),
        ("import vllm.lost", "1: vllm.lost"),
        ("\n\nfrom .layers.linear import lost", "3: vllm.layers.linear.lost"),
        ("from vllm import config\nconfig.lost", "2: vllm.config.lost"),
        ("import vllm.config as c\nc.lost()", "2: vllm.config.lost"),
        ("from vllm.config import Config\nConfig.lost", "2: vllm.config.Config.lost"),
        ("from vllm.config import Level\nLevel.HIGH", "2: vllm.config.Level.HIGH"),
        (
            "from vllm.config import Config\ndef f(c: Config): c.lost",
            "2: vllm.config.Config.lost",
        ),
        (
            "from vllm.config import load\nload('x', lost=1)",
            "2: vllm.config.load(lost=)",
        ),
        (
            "try:\n    pass\nexcept ImportError:\n    from vllm.config import lost",
            "4: vllm.config.lost",
        ),
        (
            "try:\n    from vllm.config import lost\nexcept ValueError: pass",
            "2: vllm.config.lost",
        ),
    ],
)
def test_a_lost_name_is_an_error_with_its_place(repository, module, lost):
    with pytest.raises(BuildError) as error:
        check(repository, module)
    assert f"\nvllm/callables.py:{lost} is not in vLLM 1.2.3" in str(error.value)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ('since = "1.3.0"', True),
        ('until = "1.2.3"', True),
        ('since = "1.2.3"', False),
        ('until = "1.10.0"', False),
    ],
)
def test_a_name_of_some_releases(repository, bounds, expected):
    repository.write(
        "tools/names.toml", f'[releases]\n"vllm.config.lost" = {{ {bounds} }}\n'
    )
    if expected:
        check(repository, "from vllm.config import lost")
    else:
        with pytest.raises(BuildError, match="vllm.config.lost is not in vLLM 1.2.3"):
            check(repository, "from vllm.config import lost")


def test_a_listed_private_name_has_to_exist(repository):
    entry = '_state = { in = ["vllm.old", "vllm.layers.linear"], why = "x" }\n'
    repository.write("tools/names.toml", f"[vllm]\n{entry}")
    check(repository, "from vllm import config")
    repository.write("tools/names.toml", f"[vllm]\n{entry.replace('_state', '_lost')}")
    with pytest.raises(BuildError, match="names.toml: vllm.old._lost is not in vLLM"):
        check(repository, "from vllm import config")


# ---- Private names -----------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "import torch\ntorch._lost()",
        "from torch._lost import name",
        "import torch._lost",
        "from threading import _lost",
        "getattr(object, '_lost')",
    ],
)
def test_a_private_name_has_to_be_listed(repository, module):
    repository.write("vllm/callables.py", f"\n{module}")
    with pytest.raises(BuildError, match=r"vllm/callables.py:\d: _lost"):
        private_names.check_listed()
    entry = '_lost = { in = "torch", seen = ["2.13"], why = "no public one" }\n'
    repository.write("tools/names.toml", f"[torch]\n{entry}")
    assert private_names.check_listed() == "1 names"


@pytest.mark.parametrize(
    "module",
    [
        "class A:\n    def f(self): self._own = 1\ndef g(a): return a._own",
        "def _own(): ...\n_own()",
        "import os\nos._exit(1)",
        "def f(name): return f'{name}_suffix'",
        "from vllm.callables import _own\n_own = 1",
    ],
)
def test_our_own_and_public_names_need_not_be(repository, module):
    repository.write("vllm/callables.py", module)
    assert private_names.check_listed() == "0 names"


def test_a_list_that_is_too_long_or_incomplete(repository):
    entry = '_lost = { in = "torch", seen = ["2.13"], why = "no public one" }\n'
    repository.write("tools/names.toml", f"[torch]\n{entry}")
    with pytest.raises(BuildError, match="lists _lost, which no module uses any more"):
        private_names.check_listed()
    repository.write("tools/names.toml", '[torch]\n_lost = { in = "torch" }\n')
    with pytest.raises(BuildError, match="torch, _lost: it lacks seen and why"):
        private_names.check_listed()
