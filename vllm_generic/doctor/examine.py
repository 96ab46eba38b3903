# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The examination: what an engine would do with a model, in this process alone."""

from __future__ import annotations

import gc
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import nn

import vllm
import vllm_generic
from vllm import LLM, ModelRegistry
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.models.callable_model.build import build_module
from vllm.model_executor.models.callable_model.registration import factory_in
from vllm.model_executor.models.callable_model.wrapper import CallableModelWrapper
from vllm.model_executor.models.self_check.check import why_not
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.engine.startup_failure import StartupError
from vllm_generic.doctor.looks import Built, look, look_at_plans
from vllm_generic.doctor.report import Report
from vllm_generic.doctor.subject import (
    NAMELESS,
    architecture_of,
    config_of,
    directory_without_config,
    has_weights,
    one_process,
    register,
    widest_embedding,
)

NOT_THE_MODELS = (
    *(sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")),
    *(path for package in (vllm, vllm_generic) for path in package.__path__),
)
# Of a factory without a config.json, until its module has told it.
ANY_VOCABULARY = 2
LONGEST = 400  # characters of another library's message


def examine(
    model: str | Path | None = None,
    factory: Callable[..., Any] | None = None,
    self_check: bool = False,
    **options: Any,
) -> Report:
    """Build, load and try a model as an engine's only worker, and say what is seen.

    An engine is started by `self_check` only. The memory that is needed is that of the
    weights, on the device that an engine would use. Nothing is raised for a model that
    cannot be served: the report says so.

    Args:
        model: A model directory. Without one the factory must do without a config.
        factory: What a program would register for the architecture in `config.json`.
            Without one that is done already, or the directory's `auto_map` names it.
        self_check: Start an engine in the layout that is asked for, whose self-check
            compares the model, as it serves, with its own full forward.
        options: Those of `LLM`, such as `tensor_parallel_size` and `dtype`.

    Raises:
        ValueError: There is neither a model nor a factory.

    """
    if model is None and factory is None:
        raise ValueError("Nothing to examine: give a model directory or a factory.")
    with ExitStack() as stack:
        if model is None:
            assert factory is not None
            report = Report(getattr(factory, "__name__", type(factory).__name__))
            folder = _directory_for(factory, options, report, stack)
            if folder is None:
                return report
        else:
            report, folder = Report(str(model)), Path(model)
        arguments = EngineArgs(model=str(folder), **options)
        if not has_weights(folder):
            arguments = replace(arguments, load_format="dummy")
        _Examination(arguments, factory, report).run(self_check)
    return report


def _directory_for(
    factory: Callable[..., Any],
    options: dict[str, Any],
    report: Report,
    stack: ExitStack,
) -> Path | None:
    """A directory with the config that `factory` does without; None if it does not."""
    folder = stack.enter_context(directory_without_config(ANY_VOCABULARY))
    try:
        register(NAMELESS, factory)
        config = config_of(EngineArgs(model=str(folder), **options))
        with one_process(config):
            vocab_size = widest_embedding(_build(NAMELESS, factory, config))
    except Exception as error:  # noqa: BLE001 - it is what the report is about
        report.add(
            "factory",
            "refused",
            said(error),
            "the model directory before the factory, if that reads config.json",
        )
        return None
    report.add(
        "config.json",
        "note",
        "There is none; the vocabulary is taken from the widest embedding.",
        f'{{"architectures": ["MyModel"], "vocab_size": {vocab_size}, '
        '"max_position_embeddings": ...}',
    )
    return stack.enter_context(directory_without_config(vocab_size))


class _Examination:
    """One model, and the report that is written about it."""

    def __init__(
        self, arguments: EngineArgs, factory: Callable[..., Any] | None, report: Report
    ) -> None:
        self.arguments = arguments
        self.factory = factory
        self.report = report
        self.architecture = ""

    def run(self, self_check: bool) -> None:
        config = self._config()
        if config is None:
            return
        registration = factory_in(config.model_config, self.architecture)
        if registration is None:
            self.report.add(
                "registration",
                "note",
                f"{self.architecture} is a class that is written for vLLM: there is no "
                "factory to examine.",
                "the factory behind the model directory, as module:name, if your "
                "program registers one",
            )
            return
        # Texts, because the traceback of the error would keep the model in memory.
        failure: tuple[str, str] | None = None
        unchecked = None
        with one_process(config):
            try:
                unchecked = self._loaded(config)
            except Exception as error:  # noqa: BLE001 - it is told below
                failure = str(error), said(error)
            gc.collect()
        if failure is not None:
            self._in_pieces(*failure)
        if self_check and not self.report.refused:
            self._self_check(unchecked)

    def _config(self) -> VllmConfig | None:
        """The engine's config; None if there is none, which the report then says."""
        try:
            self.architecture = architecture_of(Path(self.arguments.model))
            if self.factory is not None:
                register(self.architecture, self.factory)
            return config_of(self.arguments)
        except Exception as error:  # noqa: BLE001 - it is what the report is about
            known = self.architecture in {"", *ModelRegistry.models}
            write = f'ModelRegistry.register_model("{self.architecture}", factory)'
            self.report.add("config.json", "refused", said(error), write * (not known))
            return None

    def _loaded(self, config: VllmConfig) -> str | None:
        """Look at the model once it is loaded; returns why it has no self-check."""
        wrapper = _load(config)
        if self.arguments.load_format == "dummy":
            self.report.add("weights", "note", "There are none, so they are random.")
        else:
            self.report.add("weights", "ok", "The checkpoint fills every tensor.")
        built = self._built(wrapper.module, config)
        look(replace(built, adapted=wrapper.adapted), self.report)
        return why_not(wrapper, config)

    def _in_pieces(self, message: str, failure: str) -> None:
        """Say where the model fails, and what can be seen all the same.

        Args:
            message: Of the error that ended the loading.
            failure: The same, as the report says it.

        """
        config = config_of(self.arguments)
        registration = factory_in(config.model_config, self.architecture)
        assert registration is not None
        with one_process(config):
            try:
                module = _build(self.architecture, registration.factory, config)
            except Exception as error:  # noqa: BLE001
                self.report.add("factory", "refused", said(error))
                return
            built = self._built(module, config)
            try:
                seen = registration.look(module, config)
                adapted = registration.adapted(module, config, seen)
                built = replace(built, adapted=adapted)
            except Exception as error:  # noqa: BLE001
                self.report.add("call", "refused", said(error))
                look_at_plans(built, self.report)
                return
            look(built, self.report)
            if not any(message in found.text for found in self.report.refused):
                self.report.add("loading", "refused", failure)

    def _built(self, module: nn.Module, config: VllmConfig) -> Built:
        registration = factory_in(config.model_config, self.architecture)
        assert registration is not None
        return Built(
            architecture=self.architecture,
            module=module,
            adapted=None,
            vllm_config=config,
            model_cls=registration.load_model_cls(),
            tensor_parallel_size=self.arguments.tensor_parallel_size,
            pipeline_parallel_size=self.arguments.pipeline_parallel_size,
        )

    def _self_check(self, unchecked: str | None) -> None:
        """Start an engine, which checks the model before it takes requests."""
        layout = (
            f"TP={self.arguments.tensor_parallel_size}, "
            f"PP={self.arguments.pipeline_parallel_size}"
        )
        options: dict[str, Any] = {"enforce_eager": True, "skip_tokenizer_init": True}
        try:
            with ExitStack() as stack:
                if self.arguments.load_format == "dummy":
                    # The loader's random weights are too small to differ by.
                    folder = stack.enter_context(self._with_initial_weights())
                    options |= {"model": str(folder), "load_format": "auto"}
                arguments = replace(self.arguments, **options)
                llm = LLM.from_engine_args(arguments)
        except Exception as error:  # noqa: BLE001
            self.report.add("self-check", "refused", f"{layout}: {said(error)}")
            return
        llm.llm_engine.engine_core.shutdown()
        if unchecked is not None:
            text = f"The engine starts at {layout}. It is not checked: {unchecked}."
            self.report.add("self-check", "note", text)
        else:
            text = f"The engine starts at {layout}, and agrees with the full forward."
            self.report.add("self-check", "ok", text)

    @contextmanager
    def _with_initial_weights(self) -> Iterator[Path]:
        """A model directory with the weights that the factory initializes."""
        config = config_of(self.arguments)
        registration = factory_in(config.model_config, self.architecture)
        assert registration is not None
        with tempfile.TemporaryDirectory(prefix="vllm-doctor-") as name:
            folder = Path(name)
            for path in Path(self.arguments.model).iterdir():
                (folder / path.name).symlink_to(path.resolve())
            with one_process(config):
                module = _build(self.architecture, registration.factory, config)
                torch.save(module.state_dict(), folder / "model.pt")
            yield folder


def _load(config: VllmConfig) -> CallableModelWrapper:
    """The model as a worker has it before its first step."""
    model_config = config.model_config
    device = cast(torch.device, config.device_config.device)
    with set_default_torch_dtype(cast(torch.dtype, model_config.dtype)), device:
        wrapper = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(wrapper, model_config)
        process_weights_after_loading(wrapper, model_config, device)
    return cast(CallableModelWrapper, wrapper.eval())


def _build(architecture: str, factory: Any, config: VllmConfig) -> nn.Module:
    """What `factory` returns, built as a worker builds it."""
    dtype = cast(torch.dtype, config.model_config.dtype)
    device = cast(torch.device, config.device_config.device)
    with set_default_torch_dtype(dtype), device:
        return build_module(architecture, factory, config, "", keep_values=True)[0]


def said(error: BaseException) -> str:
    """The message of `error`, and the line of the model's code that raised it."""
    if isinstance(error, StartupError):
        return error.cause
    if isinstance(error, ValidationError):  # of vLLM's config classes
        texts = [detail["msg"] for detail in error.errors()]
        return "; ".join(text.removeprefix("Value error, ") for text in texts)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_MODELS)]
    where = f" (at {own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
    text = str(error)
    if len(text) > LONGEST:  # such as Transformers' list of all its configs
        text = text[:LONGEST].rsplit(maxsplit=1)[0] + " …"
    return f"{type(error).__name__}: {text}{where}"
