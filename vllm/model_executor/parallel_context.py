# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a model factory has to know about the parallel layout it builds for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vllm.distributed import parallel_state
from vllm.distributed.utils import get_pp_indices

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from vllm.config import ParallelConfig


@dataclass(frozen=True)
class ParallelContext:
    """This process's place in the parallel layout, as plain numbers.

    The numbers are fixed when the object is made, so it is immutable, picklable
    and costs nothing to pass around; process groups are looked up when asked for.
    `ParallelContext()` is a single process: every size 1, every rank 0, no group.
    """

    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    pipeline_parallel_size: int = 1
    pipeline_parallel_rank: int = 0
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    expert_parallel_size: int = 1
    expert_parallel_rank: int = 0

    @classmethod
    def from_config(cls, parallel_config: ParallelConfig) -> ParallelContext:
        """The context of this process.

        Sizes come from `parallel_config`, ranks from vLLM's process groups; a
        process in which those are not initialized has rank 0 everywhere.
        """
        pcp_size = parallel_config.prefill_context_parallel_size
        ep_size = 1
        if parallel_config.enable_expert_parallel:
            ep_size = parallel_config.tensor_parallel_size * pcp_size
            ep_size *= parallel_config.data_parallel_size
        return cls(
            tensor_parallel_size=parallel_config.tensor_parallel_size,
            tensor_parallel_rank=_rank(parallel_state._TP),
            pipeline_parallel_size=parallel_config.pipeline_parallel_size,
            pipeline_parallel_rank=_rank(parallel_state._PP),
            data_parallel_size=parallel_config.data_parallel_size,
            data_parallel_rank=parallel_config.data_parallel_rank,
            expert_parallel_size=ep_size,
            expert_parallel_rank=_rank(parallel_state._EP) if ep_size > 1 else 0,
        )

    @property
    def world_size(self) -> int:
        """Processes that hold one copy of the model, as in vLLM: TP x PP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def get_tensor_parallel_rank(self) -> int:
        return self.tensor_parallel_rank

    def get_tensor_parallel_world_size(self) -> int:
        return self.tensor_parallel_size

    def get_pipeline_parallel_rank(self) -> int:
        return self.pipeline_parallel_rank

    def get_pipeline_parallel_world_size(self) -> int:
        return self.pipeline_parallel_size

    def get_data_parallel_rank(self) -> int:
        return self.data_parallel_rank

    def get_data_parallel_size(self) -> int:
        return self.data_parallel_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this pipeline stage embeds the tokens."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this pipeline stage computes the logits."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    def layer_range(self, num_layers: int) -> range:
        """Indices of the layers that this pipeline stage owns, by vLLM's own split.

        `VLLM_PP_LAYER_PARTITION` is followed, and checked, as vLLM does.
        """
        return range(
            *get_pp_indices(
                num_layers, self.pipeline_parallel_rank, self.pipeline_parallel_size
            )
        )

    def get_tp_process_group(self) -> ProcessGroup | None:
        """The tensor-parallel group of tensors on the device, None outside vLLM."""
        return _process_group(parallel_state._TP)

    def get_pp_process_group(self) -> ProcessGroup | None:
        """The pipeline-parallel group of tensors on the device, None outside vLLM."""
        return _process_group(parallel_state._PP)

    def get_dp_process_group(self) -> ProcessGroup | None:
        """The data-parallel group of tensors on the device, None outside vLLM."""
        return _process_group(parallel_state._DP)

    def device_mesh(self) -> DeviceMesh:
        """A one-dimensional mesh named `tp` over the tensor-parallel group.

        Raises:
            RuntimeError: vLLM's process groups are not initialized here.

        """
        group = self._required(self.get_tp_process_group(), "device_mesh")
        device_type = torch.get_default_device().type
        return DeviceMesh.from_group(group, device_type, mesh_dim_names=("tp",))

    def megatron_groups(self) -> ProcessGroupCollection:
        """vLLM's groups as megatron-core's `ProcessGroupCollection`.

        Pass it as `pg_collection`; Megatron's own `parallel_state` stays untouched.
        Context and expert parallelism get the one-rank or tensor-parallel groups
        that a dense model without context parallelism has.

        Raises:
            RuntimeError: vLLM's process groups are not initialized here.

        """
        from megatron.core.process_groups_config import ProcessGroupCollection

        tp = self._required(self.get_tp_process_group(), "megatron_groups")
        pp = self._required(self.get_pp_process_group(), "megatron_groups")
        dp = self._required(self.get_dp_process_group(), "megatron_groups")
        groups = ProcessGroupCollection()
        groups.tp, groups.pp, groups.dp = tp, pp, dp
        groups.tp_cp = groups.expt_tp = tp
        groups.dp_cp = groups.expt_dp = dp
        # Only vLLM's PCP group is sure to have one rank when PP, TP or DP do not.
        groups.cp = groups.ep = parallel_state.get_pcp_group().device_group
        groups.tp_ep = tp
        # Weight tying across stages and their sequence hand-over stay with vLLM.
        groups.embd = groups.pos_embd = None
        return groups

    @staticmethod
    def _required(group: ProcessGroup | None, caller: str) -> ProcessGroup:
        if group is None:
            raise RuntimeError(
                f"ParallelContext.{caller}() needs process groups, but vLLM's are not "
                "initialized in this process. Call it inside a model factory, or "
                "after vllm.distributed.initialize_model_parallel()."
            )
        return group


def _rank(group: parallel_state.GroupCoordinator | None) -> int:
    return group.rank_in_group if group is not None else 0


def _process_group(
    group: parallel_state.GroupCoordinator | None,
) -> ProcessGroup | None:
    return group.device_group if group is not None else None
