# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's `nccl` backend of weight transfer, with a store that CPUs have for the bytes.

The worker's side is vLLM's own: it reloads layer by layer, and calls `load_weights`
for one tensor at a time, as `packed=False` does on a GPU. `build` is a model that a
server names, so that this module is imported there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLWeightTransferEngine,
)
from vllm.model_executor.layers import TrainableFlashAttention

VOCAB, HIDDEN, HEADS, LAYERS = 128, 64, 2, 2
CONFIG = {
    "architectures": ["DividedGPT"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}


class DividedGPT(nn.Module):
    """A plain module; a plan divides its attention."""

    tp_plan = {"layers.*.[qkv]_proj": "colwise", "layers.*.o_proj": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(
            TrainableFlashAttention(HIDDEN, HEADS, rope_theta=1e4)
            for _ in range(LAYERS)
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, positions)
        return x


def build(vllm_config: object, parallel_context: object) -> DividedGPT:
    return DividedGPT()


def meet(info: Any, rank: int) -> StatelessProcessGroup:
    return StatelessProcessGroup.create(
        info.master_address, info.master_port, rank, info.world_size
    )


class StoreEngine(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        rank = self.parallel_config.rank + init_info.rank_offset
        self.model_update_group = meet(init_info, rank)  # type: ignore[assignment]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        group: Any = self.model_update_group
        for name in self.parse_update_info(update_info).names:
            self.model.load_weights([(name, group.broadcast(torch.empty(0), 0))])


@dataclass
class StoreInitInfo(NCCLTrainerInitInfo):
    backend = "store"


class StoreTrainer(TrainerWeightTransferEngine):
    init_info_cls = StoreInitInfo
    group: StatelessProcessGroup

    @classmethod
    def trainer_init(
        cls, init_info: StoreInitInfo, *, client: Any, source: Any = None
    ) -> StoreTrainer:
        engine = cls(client=client, source=source)
        info = {name: getattr(init_info, name) for name in ("master_address",)}
        info |= {"master_port": init_info.master_port, "rank_offset": 1}
        info |= {"world_size": init_info.world_size}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.init_weight_transfer_engine, info)
            engine.group = meet(init_info, rank=0)
            answer.result()
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        meta = self.source.metadata()
        info = {
            "names": [each.name for each in meta],
            "dtype_names": [str(each.dtype).split(".")[-1] for each in meta],
            "shapes": [list(each.shape) for each in meta],
        }
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.client.update_weights, info)
            for _, tensor in self.source:
                self.group.broadcast(tensor.detach(), 0)
            answer.result()
        self.client.finish_weight_update()


WeightTransferEngineFactory.register_engine("store", StoreEngine)
WeightTransferTrainerFactory.register_engine("store", StoreTrainer)
