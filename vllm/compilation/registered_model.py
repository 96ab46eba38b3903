# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""torch.compile of models that a registered callable builds.

vLLM compiles a class whose author has decorated and tried it. Nobody has tried a
registered module, so it is compiled if that is possible, and else runs eagerly. vLLM
drops every guard, so compiled code is cached under a digest of the module, and not only
under its files and config.json.
"""

from __future__ import annotations

import copy
import functools
import uuid
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import vllm.envs as envs
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.module_digest import UndeterminedError, module_digest
from vllm.compilation.passes.utility.separate_residual import SeparateResidualPass
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pcp_group, get_pp_group, get_tp_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger

logger = init_logger(__name__)

# Axes along which the arguments of a model's forward vary from step to step.
TOKEN_AXES: dict[str, int | list[int] | dict[int, str]] = {
    "input_ids": 0,
    "positions": -1,
    "intermediate_tensors": 0,
    "inputs_embeds": 0,
}


def record(model: Any, *args: Any, **kwargs: Any) -> str:
    """Record what an unchanged module does, because no trace keeps its routed calls.

    Its example has a number of tokens of its own, and not that of the batch whose
    adapters are set.

    Args:
        model: Has `adapted`.
        *args: Of its forward.
        **kwargs: Of its forward.

    Returns:
        What tells the recording from others.

    """
    manager = model.lora_manager
    with nullcontext() if manager is None else manager.without_adapters():
        return model.adapted.record(model.attention_calls, *args, **kwargs)


def compile_if_possible(model_cls: type[Any]) -> type[Any]:
    """Have instances of `model_cls` compiled by vLLM, or run eagerly with a warning.

    An instance runs eagerly if it cannot be compiled on every rank of the engine. The
    ranks agree on that in the first call, when each has compiled or loaded its code
    and none has run it. An error that comes later is the model's own and is raised.
    Modules with DTensors are not tried.

    vLLM's own switches apply (`enforce_eager`, `compilation_config.mode`). With
    `VLLM_BATCH_INVARIANT` the compiled code rounds as eager execution does, for a
    trainer that runs eagerly to compute the same bits.
    """
    decorated = support_torch_compile(dynamic_arg_dims=TOKEN_AXES)(model_cls)
    init, call = decorated.__init__, decorated.__call__

    @functools.wraps(init)
    def init_and_choose(self: Any, *, vllm_config: VllmConfig, **kwargs: Any) -> None:
        _set_inductor_options(vllm_config)
        init(self, vllm_config=vllm_config, **kwargs)
        self._agreed_to_compile = False
        if not self.do_not_compile:
            # A traced DTensor keeps the number of tokens of the first call, and
            # vLLM has dropped the guards that would notice another number.
            # A draft head has another argument with tokens, which has no mark.
            traceable = not (
                _has_wrapped_tensors(self.module)
                or getattr(self, "is_draft_head", False)
            )
            adapted = getattr(self, "adapted", None)
            if adapted is not None and not adapted.can_be_recorded:
                logger.info(
                    "%s runs without torch.compile: calls are not recorded in a "
                    "pipeline stage or in the exact mode.",
                    type(self.module).__name__,
                )
                traceable = False
            self.do_not_compile = not true_on_all_ranks(traceable)

    def call_or_fall_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.do_not_compile or self._agreed_to_compile or _is_eager_call():
            return call(self, *args, **kwargs)
        adapted = getattr(self, "adapted", None)
        code = self.original_code_object()
        hook = register_bytecode_hook(
            lambda traced, _: _agree_to_compile(self) if traced is code else None
        )
        try:
            if adapted is not None:
                _add_digest(record(self, *args, **kwargs), self.vllm_config)
            return call(self, *args, **kwargs)
        except Exception as error:
            if self._agreed_to_compile:
                raise
            # Nothing has run yet, so the error is from Dynamo, from Inductor, or from
            # the module while it was traced. The eager call raises the last one again.
            if self.do_not_compile:
                reason = "another rank could not"
            else:
                reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
                true_on_all_ranks(False)
        finally:
            hook.remove()
        self.do_not_compile = True
        if adapted is not None:
            adapted.forget_recording()
        logger.warning(
            "%s runs without torch.compile, which cannot trace it (%s). Register "
            "it with supports_torch_compile=False, or start with enforce_eager, "
            "to do without the attempt.",
            model_cls.__name__,
            reason,
        )
        return self.forward(*args, **kwargs)

    decorated.__init__ = init_and_choose
    decorated.__call__ = call_or_fall_back
    decorated.aot_compiled_fn = _AgreedFunction()
    return decorated


class _OtherRankFailedError(RuntimeError):
    """This rank could run compiled code, but another cannot."""


class _AgreedFunction:
    """`aot_compiled_fn`, which vLLM sets when it has compiled or loaded, then calls."""

    def __get__(self, model: Any, owner: type[Any]) -> Any:
        return vars(model).get("aot_compiled_fn")

    def __set__(self, model: Any, function: Any) -> None:
        model._agreed_to_compile = False
        if function is not None:
            _agree_to_compile(model)
        vars(model)["aot_compiled_fn"] = function


def _agree_to_compile(model: Any) -> None:
    """Say that this rank is ready, and learn whether all are.

    Raises:
        _OtherRankFailedError: One is not, and all run eagerly.

    """
    model._agreed_to_compile = true_on_all_ranks(True)
    model.do_not_compile = not model._agreed_to_compile
    if model.do_not_compile:
        raise _OtherRankFailedError("Another rank could not compile the model.")


def true_on_all_ranks(value: bool) -> bool:
    """Whether `value` holds on all ranks of this engine. All have to call this."""
    result = torch.tensor(int(value), device="cpu")
    for group in (get_tp_group(), get_pcp_group(), get_pp_group()):
        if group.world_size > 1:
            dist.all_reduce(result, dist.ReduceOp.MIN, group=group.cpu_group)
    return bool(result)


def _is_eager_call() -> bool:
    """Whether vLLM skips its compiled code in this call."""
    if torch.compiler.is_compiling():
        return True
    return is_forward_context_available() and get_forward_context().skip_compiled


def _has_wrapped_tensors(module: nn.Module) -> bool:
    """Whether a tensor subclass such as DTensor is anywhere in the module."""
    pending: list[Any] = [module]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            return True
        if isinstance(value, nn.Module | torch.Tensor | dict | list | tuple):
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module | torch.Tensor):
                value = vars(value)
            pending += value.values() if isinstance(value, dict) else value
    return False


def _set_inductor_options(vllm_config: VllmConfig) -> None:
    """Add the pass below, or with `VLLM_BATCH_INVARIANT` those of `eager_rounding`."""
    config = vllm_config.compilation_config
    if config.mode == CompilationMode.NONE:
        return
    if envs.VLLM_BATCH_INVARIANT:
        from vllm.compilation import eager_rounding

        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # vLLM has resolved it by now
        config.inductor_compile_config |= eager_rounding.options_for(
            dtype, vllm_config.device_config.device_type
        )
    else:
        config.inductor_compile_config.setdefault(
            "post_grad_custom_post_pass", SeparateResidualPass()
        )


def add_to_compile_hash(module: nn.Module, vllm_config: VllmConfig) -> None:
    """Make vLLM's cache of compiled code depend on what `module` is.

    Two callables may build different modules from the same files and the same
    config.json: a lambda's variables are in neither. If a part of the module cannot
    be determined, its key is unique, so that nothing is found under it. Of a module
    whose forward is recorded the recording's digest is added when there is one.
    """
    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        return
    try:
        digest = module_digest(module)
    except UndeterminedError as error:
        digest = uuid.uuid4().hex
        logger.warning(
            "%s is compiled anew at every start, because it cannot be told from other "
            "modules by its contents: %s.",
            type(module).__name__,
            error,
        )
    _add_digest(digest, vllm_config)


def _add_digest(digest: str, vllm_config: VllmConfig) -> None:
    config: Any = vllm_config.additional_config
    if isinstance(config, dict):
        # There may be two models in one engine.
        digests = {*config.get("registered_modules", ()), digest}
        config = config | {"registered_modules": sorted(digests)}
    else:
        config = copy.copy(config)
        compute_hash = config.compute_hash
        config.compute_hash = lambda: f"{compute_hash()} {digest}"
    vllm_config.additional_config = config
