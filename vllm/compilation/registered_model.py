# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""torch.compile of models that a registered callable builds.

vLLM compiles a class that its author has decorated and tried. A registered module is
nobody's decorated class, so it is compiled if it can be, and runs eagerly if not; and
since vLLM drops every guard, its compiled code is cached under what the module is,
not only under what its files and config.json say.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import vllm.envs as envs
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, VllmConfig
from vllm.logger import init_logger

logger = init_logger(__name__)

aten = torch.ops.aten

# Axes along which the arguments of a model's forward vary from step to step.
TOKEN_AXES: dict[str, int | list[int] | dict[int, str]] = {
    "input_ids": 0,
    "positions": -1,
    "intermediate_tensors": 0,
    "inputs_embeds": 0,
}


def compile_if_possible(model_cls: type[Any]) -> type[Any]:
    """Have instances of `model_cls` compiled by vLLM, or run eagerly with a warning.

    Modules with DTensors always run eagerly.

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
        if any(map(is_traceable_wrapper_subclass, self.module.parameters())):
            # Traced, a DTensor keeps the number of tokens of its first call, and
            # without guards nothing would notice.
            self.do_not_compile = True

    def call_or_fall_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except Exception as error:
            # Of any type, if it is compiled ahead of time. One that is the module's
            # own comes again from the eager run.
            if self.do_not_compile or self.compiled:
                raise
            self.do_not_compile = True
            logger.warning(
                "%s runs without torch.compile, which cannot trace it (%s). Register "
                "it with supports_torch_compile=False, or start with enforce_eager, "
                "to do without the attempt.",
                model_cls.__name__,
                f"{type(error).__name__}: {error}".strip().partition("\n")[0],
            )
            return self.forward(*args, **kwargs)

    decorated.__init__ = init_and_choose
    decorated.__call__ = call_or_fall_back
    return decorated


def _set_inductor_options(vllm_config: VllmConfig) -> None:
    """Add the pass below, or with `VLLM_BATCH_INVARIANT` those of `eager_rounding`."""
    config = vllm_config.compilation_config
    if config.mode == CompilationMode.NONE:
        return
    if envs.VLLM_BATCH_INVARIANT:
        from vllm.compilation import eager_rounding

        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # resolved by now
        config.inductor_compile_config |= eager_rounding.options_for(
            dtype, vllm_config.device_config.device_type
        )
    else:
        config.inductor_compile_config.setdefault(
            "post_grad_custom_post_pass", SeparateResidualPass()
        )


class SeparateResidualPass(InductorPass):
    """Takes sums with a residual stream out of the matrix products before them.

    Inductor makes one `addmm` of both, which begins by copying the residual. A sum of
    its own is fused into the norm that follows. The sums with a bias stay.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            residual, a, b = node.args
            if node.kwargs or residual.meta["val"].dim() < 2:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (residual, product))
            for part in (product, total):
                part.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)


def add_to_compile_hash(module: nn.Module, vllm_config: VllmConfig) -> None:
    """Make vLLM's cache of compiled code depend on what `module` is.

    Two callables may build different modules from the same files and the same
    config.json: a lambda's variables are in neither.
    """
    config = vllm_config.additional_config
    if isinstance(config, dict):
        digest = hashlib.sha256()
        for part in _constants(module):
            digest.update(part.encode() + b"\0")
        vllm_config.additional_config = config | {
            "registered_module": digest.hexdigest()
        }


def _constants(module: nn.Module) -> Iterator[str]:
    """What tracing `module` may burn into its graph, as text."""
    for name, child in module.named_modules():
        yield f"{name}: {type(child).__module__}.{type(child).__qualname__}"
        for key, value in sorted(vars(child).items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                yield f"{name}.{key}={_text(value, set())}"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield f"{name}: {tensor.dtype} {list(tensor.shape)} {list(tensor.stride())}"


def _text(value: Any, seen: set[int]) -> str:
    """`value` by its contents, without addresses, which change from run to run."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return str(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if id(value) in seen or isinstance(value, type | nn.Module):
        return name
    nested = functools.partial(_text, seen=seen | {id(value)})
    if isinstance(value, Mapping):
        return str([(nested(key), nested(item)) for key, item in value.items()])
    if isinstance(value, set | frozenset):
        return str(sorted(map(nested, value)))
    if isinstance(value, list | tuple):
        return str(list(map(nested, value)))
    if isinstance(value, functools.partial):
        return nested((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return nested(value.__func__)
    if isinstance(value, types.FunctionType):
        code = value.__code__
        constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return code.co_code.hex() + nested([constants, value.__defaults__, closure])
    if name.partition(".")[0] in ("vllm", "torch"):
        return name  # its state follows from the config, which is hashed as well
    return name + nested(getattr(value, "__dict__", ()))
