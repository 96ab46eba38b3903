# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a model factory has to know about the parallel layout it builds for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vllm.distributed import parallel_state
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from vllm.config import ParallelConfig

__all__ = ["ParallelContext"]

MESH_AXES = ("dp", "pp", "pcp", "tp")


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
    prefill_context_parallel_size: int = 1
    prefill_context_parallel_rank: int = 0
    decode_context_parallel_size: int = 1
    decode_context_parallel_rank: int = 0

    @classmethod
    def from_config(cls, parallel_config: ParallelConfig) -> ParallelContext:
        """The context of this process.

        Sizes come from `parallel_config`, ranks from vLLM's process groups; a
        process in which those are not initialized has rank 0 everywhere. Expert
        parallelism has size 1 unless it is enabled for a mixture of experts. Data
        parallel ranks of a dense model are engines on their own: each has size 1.
        """
        pcp_size = parallel_config.prefill_context_parallel_size
        ep_size = 1
        is_dense = parallel_config.is_moe_model is False  # None: not known
        if parallel_config.enable_expert_parallel and not is_dense:
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
            prefill_context_parallel_size=pcp_size,
            prefill_context_parallel_rank=_rank(parallel_state._PCP),
            decode_context_parallel_size=parallel_config.decode_context_parallel_size,
            decode_context_parallel_rank=_rank(parallel_state._DCP),
        )

    @property
    def world_size(self) -> int:
        """Processes of one engine, as in vLLM: TP x PP x prefill context parallel."""
        return (
            self.tensor_parallel_size
            * self.pipeline_parallel_size
            * self.prefill_context_parallel_size
        )

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

        `VLLM_PP_LAYER_PARTITION` is followed, and checked, as vLLM does. Without
        pipeline parallelism, all of them.
        """
        if self.pipeline_parallel_size == 1:  # whatever an engine beside it is told
            return range(num_layers)
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

    def get_ep_process_group(self) -> ProcessGroup | None:
        """The expert-parallel group of tensors on the device, None outside vLLM.

        It spans the tensor, prefill context and data parallel ranks of a stage.
        vLLM makes it for a mixture of experts only.
        """
        return _process_group(parallel_state._EP)

    def get_pcp_process_group(self) -> ProcessGroup | None:
        """The prefill-context-parallel group, None outside vLLM."""
        return _process_group(parallel_state._PCP)

    def get_dcp_process_group(self) -> ProcessGroup | None:
        """The decode-context-parallel group, None outside vLLM.

        Its ranks are ranks of the tensor-parallel and prefill-context groups.
        """
        return _process_group(parallel_state._DCP)

    def device_mesh(self) -> DeviceMesh:
        """vLLM's groups as a mesh with the axes `dp`, `pp`, `pcp` and `tp`.

        It has all ranks that hold the model. `parallelize_module` takes
        `device_mesh()["tp"]`, and `fully_shard` takes `device_mesh()["dp"]`.

        Raises:
            RuntimeError: vLLM's process groups are not initialized here.

        """
        groups = [
            self._required(group, "device_mesh")
            for group in (
                self.get_dp_process_group(),
                self.get_pp_process_group(),
                self.get_pcp_process_group(),
                self.get_tp_process_group(),
            )
        ]
        # vLLM's order of ranks; outermost are models that know nothing of each other.
        ranks = torch.arange(dist.get_world_size(), device="cpu")
        ranks = ranks.view(-1, *(group.size() for group in groups))
        return DeviceMesh.from_group(
            groups,
            current_platform.device_type,
            mesh=ranks[dist.get_rank() // ranks[0].numel()],
            mesh_dim_names=MESH_AXES,
        )

    def megatron_groups(self) -> ProcessGroupCollection:
        """vLLM's groups as megatron-core's `ProcessGroupCollection`.

        Pass it as `pg_collection`; Megatron's own `parallel_state` stays untouched.
        The experts of a mixture are whole on one rank if vLLM's expert parallelism
        is enabled, and else split as the dense layers are. `embd` and `pos_embd` are
        None: weights come from the checkpoint, also where two stages share them.

        Raises:
            RuntimeError: vLLM's process groups are not initialized here.
            ValueError: there is prefill context parallelism, over which vLLM lacks
                the groups that Megatron wants.

        """
        from megatron.core.process_groups_config import ProcessGroupCollection

        tp = self._required(self.get_tp_process_group(), "megatron_groups")
        pp = self._required(self.get_pp_process_group(), "megatron_groups")
        dp = self._required(self.get_dp_process_group(), "megatron_groups")
        alone = self._required(self.get_pcp_process_group(), "megatron_groups")
        if alone.size() > 1:
            raise ValueError(
                "ParallelContext.megatron_groups() needs "
                f"prefill_context_parallel_size=1, got {alone.size()}: vLLM has no "
                "groups of tensor and context parallel ranks together."
            )
        groups = ProcessGroupCollection()
        groups.tp, groups.pp, groups.dp, groups.cp = tp, pp, dp, alone
        groups.tp_cp, groups.dp_cp = tp, dp
        groups.tp_dp_cp = self.get_ep_process_group() or tp
        if self.expert_parallel_size > 1:
            ep = self._required(self.get_ep_process_group(), "megatron_groups")
            groups.ep = groups.tp_ep = ep
            groups.expt_tp = groups.expt_dp = alone
        else:
            groups.ep, groups.expt_tp, groups.tp_ep = alone, tp, tp
            groups.expt_dp = dp
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
