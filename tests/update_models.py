# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models of each kind of parameter, whose weights are changed while they are served.

Each has a plain reference, a buffer that is saved, one that is not, and a tensor that
is neither parameter nor buffer; all three take part in the hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import layout_models
import parallel_transformer
import torch
from layout_models import EXPERTS, PLAIN, PlannedStage, Stage
from safetensors.torch import load_file
from torch import nn

from vllm.distributed import get_world_group
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.parallel_context import ParallelContext

Weights = dict[str, torch.Tensor]
CONFIG = layout_models.CONFIG | {"num_hidden_layers": 2}
SHIFT = 0.5


def with_constants(model: nn.Module) -> nn.Module:
    """`model`, whose hidden states are multiplied and shifted by its constants."""
    with contextlib.suppress(ValueError):  # here, because workers may be spawned
        WeightTransferEngineFactory.register_engine("file", FileTransfer)
    model.register_buffer("scale", torch.ones(()))
    model.register_buffer("unsaved", torch.tensor(SHIFT), persistent=False)
    model.constant = torch.tensor(-SHIFT)  # neither parameter nor buffer
    forward = model.forward

    @functools.wraps(forward)
    def with_shift(*args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(*args, **kwargs) * model.scale + model.unsaved + model.constant

    model.forward = with_shift
    return model


class Tied(Stage):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lm_head.weight = self.embedding.weight


class TiedPlanned(Tied, PlannedStage):
    pass


def build_plain(vllm_config: Any, context: ParallelContext) -> nn.Module:
    config = vllm_config.model_config.hf_config
    return with_constants(Stage(config, ParallelContext(), PLAIN))


def build_tied(vllm_config: Any, context: ParallelContext) -> nn.Module:
    config = vllm_config.model_config.hf_config
    return with_constants(Tied(config, ParallelContext(), PLAIN))


def build_planned(vllm_config: Any, context: ParallelContext) -> nn.Module:
    config = vllm_config.model_config.hf_config
    return with_constants(TiedPlanned(config, ParallelContext(), PLAIN))


def build_dtensor(vllm_config: Any, context: ParallelContext) -> nn.Module:
    return with_constants(layout_models.build_dtensor(vllm_config, context))


def build_megatron(vllm_config: Any, context: ParallelContext) -> nn.Module:
    return with_constants(layout_models.build_megatron(vllm_config, context))


def build_vllm(vllm_config: Any, context: ParallelContext) -> nn.Module:
    return with_constants(parallel_transformer.ParallelTransformer(context))


def build_experts(vllm_config: Any, context: ParallelContext) -> nn.Module:
    """With vLLM's layers, and its fused experts; it has no `load_weights`."""
    config = vllm_config.model_config.hf_config
    return with_constants(Stage(config, context, layout_models.FUSED))


def build_vllm_tied(vllm_config: Any, context: ParallelContext) -> nn.Module:
    model = parallel_transformer.ParallelTransformer(context, tied=True)
    return with_constants(model)


# ---- References


def _stage(tied: bool) -> nn.Module:
    config = SimpleNamespace(**CONFIG)
    return (Tied if tied else Stage)(config, ParallelContext(), PLAIN)


def stage_shapes(tied: bool) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in _stage(tied).state_dict().items()}


def stage_logits(weights: Weights, tied: bool) -> Callable[[torch.Tensor], Any]:
    return _logits_of(_stage(tied), weights)


def _logits_of(model: Any, weights: Weights) -> Callable[[torch.Tensor], Any]:
    model.load_state_dict({n: t for n, t in weights.items() if n != "scale"})

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = model(ids, torch.arange(len(ids)))
        return model.lm_head(hidden * weights["scale"])

    return logits


def _mixture() -> nn.Module:
    return layout_models.build_plain(SimpleNamespace(**CONFIG | EXPERTS))


def mixture_shapes(tied: bool) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in _mixture().state_dict().items()}


def mixture_logits(weights: Weights, tied: bool) -> Callable[[torch.Tensor], Any]:
    return _logits_of(_mixture(), weights)


def vllm_shapes(tied: bool) -> dict[str, torch.Size]:
    weights = parallel_transformer.whole_weights(tied)
    return {name: t.shape for name, t in weights.items()}


def vllm_logits(weights: Weights, tied: bool) -> Callable[[torch.Tensor], Any]:
    head = weights["embedding.weight" if tied else "lm_head.weight"]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = parallel_transformer.reference_hidden(weights, ids[None])[0]
        return hidden * weights["scale"] @ head.T + weights["lm_head.bias"]

    return logits


class Kind:
    """A factory, its config, and what the same weights compute elsewhere."""

    def __init__(
        self, factory: Any, config: dict[str, Any], tied: bool, shapes: Any, logits: Any
    ) -> None:
        self.factory = factory
        self.config = config | {"architectures": ["Updated"]}
        self._tied = tied
        self._shapes = shapes
        self._logits = logits

    def weights(self, seed: int) -> Weights:
        """Whole tensors by name, each time the same for one seed."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self._shapes(self._tied) | {"scale": torch.Size()}
        weights = {
            name: torch.randn(shape, generator=generator) * 0.3
            for name, shape in shapes.items()
        }
        if self._tied and "lm_head.weight" in weights:
            weights["lm_head.weight"] = weights["embedding.weight"].clone()
        weights["scale"] = torch.tensor(1.0 + seed / 2)
        return weights

    def logits(self, weights: Weights) -> Callable[[torch.Tensor], Any]:
        return self._logits(weights, self._tied)


def _kind(factory: Any, tied: bool = False) -> Kind:
    return Kind(factory, CONFIG, tied, stage_shapes, stage_logits)


def _vllm(factory: Any, tied: bool = False) -> Kind:
    config = parallel_transformer.CONFIG
    return Kind(factory, config, tied, vllm_shapes, vllm_logits)


KINDS = {
    "plain": _kind(build_plain),
    "tied": _kind(build_tied, tied=True),
    "vllm": _vllm(build_vllm),
    "vllm-tied": _vllm(build_vllm_tied, tied=True),
    "dtensor": _kind(build_dtensor),
    "megatron": _kind(build_megatron),
    "plan": _kind(build_planned, tied=True),
    "experts": Kind(
        build_experts, CONFIG | EXPERTS, False, mixture_shapes, mixture_logits
    ),
}


# ---- What workers run


def load_parts(model: nn.Module, parts: Iterable[list[tuple[str, Any]]]) -> None:
    """As TRL and others do: one call for each part."""
    for part in parts:
        model.load_weights(part)


def load_iterator(model: nn.Module, weights: list[tuple[str, Any]]) -> None:
    model.load_weights(iter(weights))


def reload_iterator(worker: Any, weights: list[tuple[str, Any]]) -> None:
    worker.reload_weights(weights_iterator=iter(weights))


def load_and_fail(model: nn.Module, weights: list[tuple[str, Any]]) -> None:
    """Reading breaks off after a few tensors."""

    def read() -> Any:
        yield from weights
        raise OSError("the file system went away")

    model.load_weights(read())


def load_on_one_rank(model: nn.Module, weights: list[tuple[str, Any]]) -> None:
    """The last rank cannot read what the others load."""
    ranks = get_world_group()
    if ranks.is_last_rank:
        raise OSError("the file system is gone")
    model.load_weights(weights)


@dataclass
class FromFile:
    """What the trainer sends: names, and where their tensors are."""

    path: str = ""
    names: list[str] = field(default_factory=list)


class FileTransfer(WeightTransferEngine[FromFile, FromFile]):
    """As vLLM's `nccl` engine but for the transport: a call for each tensor."""

    init_info_cls = FromFile
    update_info_cls = FromFile

    def init_transfer_engine(self, init_info: FromFile) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # no GPU to wait for

    def receive_weights(self, update_info: FromFile) -> None:
        weights = load_file(update_info.path)
        for name in update_info.names:
            self.model.load_weights([(name, weights[name])])

    def shutdown(self) -> None:
        pass


def addresses(model: nn.Module) -> dict[str, int]:
    """Where each tensor lies, the one that is neither parameter nor buffer, too."""
    found = {}
    for path, part in model.named_modules():
        for leaf, tensor in (part._parameters | part._buffers).items():
            if tensor is not None:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                found[f"{path}.{leaf}"] = local.data_ptr()
    module = getattr(model, "module", model)
    found["constant"] = module.constant.data_ptr()
    return found


def constants(model: nn.Module) -> list[float]:
    return [float(model.unsaved), float(model.constant)]


def shuffled(weights: Weights, seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    items = list(weights.items())
    random.Random(seed).shuffle(items)
    return items


def one_by_one(weights: Weights, seed: int = 0) -> list[list[Any]]:
    """A call for each tensor, in any order."""
    return [[item] for item in shuffled(weights, seed)]


def buckets(weights: Weights, size: int, seed: int = 0) -> list[list[Any]]:
    """A call for each few tensors, in any order."""
    items = shuffled(weights, seed)
    return [items[i : i + size] for i in range(0, len(items), size)]


def load_sparse(
    model: nn.Module, weights: list[tuple[str, torch.Tensor]], old: Weights
) -> None:
    """As `sparse_nccl` does with what it has received: the elements that changed."""
    patches = []
    for name, tensor in weights:
        changed = (tensor != old[name]).flatten().nonzero().flatten()
        patches.append(
            CheckpointWeightPatch(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                values=tensor.flatten()[changed],
                indices=changed.int(),
            )
        )
    load_checkpoint_weight_patches(model, patches)
