# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import json
import os
import platform
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

# Before vllm is imported: one thread a process, and no look-up on a hub.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # stdout is for results
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's attention would round float32 to TF32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
# A pool of Inductor's would outlive an engine in this process.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# To count GPUs without a CUDA context, after which nothing can be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Compiled code of this run alone: what a cache holds would decide which path is tested.
CACHES = tempfile.TemporaryDirectory(prefix="vllm-tests-")
os.environ["VLLM_CACHE_ROOT"] = f"{CACHES.name}/vllm"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{CACHES.name}/inductor"
# Tables and messages are as wide, and as plain, on every terminal.
os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
os.environ.pop("FORCE_COLOR", None)

# A shell starts background jobs with Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

GUARDS: list[Any] = []  # of PyTorch's state, after tests that had changed it
TESTS = str(Path(__file__).parent)
sys.path.insert(0, TESTS)  # tiny_model, also in processes that unpickle it
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [TESTS, os.environ.get("PYTHONPATH")])
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write outcomes and versions there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    available = torch.cuda.device_count()
    if available:  # a reference's pool of threads does not survive the fork of workers
        torch.set_num_threads(1)
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        (needed,) = marker.args or (1,)
        if available < needed:
            reason = f"needs {needed} GPU(s), there are {available}"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Keeps, for what CI cannot run, what was run last and where."""
    path = config.getoption("--results")
    if path is None:
        return
    import vllm

    outcomes = {
        report.nodeid: outcome
        for outcome in ("passed", "failed", "skipped", "error")
        for report in terminalreporter.stats.get(outcome, [])
    }
    results = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
        "counts": dict(Counter(outcomes.values())),
        "outcomes": outcomes,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


@pytest.fixture(autouse=True)
def registrations_end_with_the_test() -> Iterator[None]:
    """Tests of one process share vLLM's registry."""
    name = "vllm.model_executor.models.registry"
    registry = sys.modules.get(name)
    before = dict(registry.ModelRegistry.models) if registry else None
    yield
    if registry := sys.modules.get(name):
        models = registry.ModelRegistry.models
        added = models.keys() - (registry._VLLM_MODELS if before is None else before)
        for architecture in added:
            del models[architecture]
        models.update(before or {})


@pytest.fixture(autouse=True)
def pytorch_is_left_as_it_was() -> Iterator[None]:
    """What a test leaves switched off would fail others of its process, far away."""
    include, exclude = _dispatched_keys()
    gradients = torch.is_grad_enabled()
    yield
    left = _dispatched_keys(), torch.is_grad_enabled()
    if str(left) != str(((include, exclude), gradients)):
        guard = torch._C._ForceDispatchKeyGuard(include, exclude)
        guard.__enter__()
        GUARDS.append(guard)  # it would restore what was left when it is freed
        torch.set_grad_enabled(gradients)
        pytest.fail(f"The test left PyTorch with dispatch keys and gradients {left}.")


def _dispatched_keys() -> tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]:
    """Those that this thread includes and excludes."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._dispatch_tls_local_include_set(), excluded


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with TinyModel's config and weights."""
    from tiny_model import CONFIG, trained_model

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(trained_model().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def model_dir_with_tokenizer(model_dir: Path) -> Path:
    """Token i is the word `t<i>`."""
    from tiny_model import VOCAB
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model_dir)
    return model_dir


@pytest.fixture
def fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that this process starts are forked from a server, on a CPU."""
    from fork_server import Context

    from vllm.platforms import current_platform
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    if current_platform.is_cpu():
        forkserver.ensure_running()
        for module in (coordinator, utils, multiproc_executor):
            monkeypatch.setattr(module, "get_mp_context", Context)
    # The variable would go before the option `kv_cache_memory_bytes`.
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.fixture
def start(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, fork_server: None
) -> Iterator[Callable]:
    """Starts `LLM()` on `model_dir`, in this process unless `processes=True`.

    What it started is stopped after the test, and nothing may be left over.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    before = set(psutil.Process().children(recursive=True))
    started = []

    def start_llm(processes: bool = False, **options: Any) -> LLM:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(processes)))
        defaults = {
            "model": str(model_dir),
            "dtype": "float32",
            "max_model_len": 128,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 24,
            "gpu_memory_utilization": 0.1,  # other tests may be on the same GPU
        }
        llm = LLM(**(defaults | options))
        started.append(llm)
        return llm

    yield start_llm
    for llm in started:
        llm.llm_engine.engine_core.shutdown(timeout=30)
    cleanup_dist_env_and_memory()
    # multiprocessing keeps one resource tracker for the life of this process.
    tracker = resource_tracker._resource_tracker._pid
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs([p for p in left if p.pid != tracker], timeout=10)
    assert not alive, f"left over: {alive}"
