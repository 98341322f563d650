"""A learner on several processes: each holds a shard of every network and learns from its own share of each minibatch.

Networks are sharded by torch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277): a layer's weights are
gathered when it is computed, and its gradient is summed over the ranks and scattered again. Because every loss is taken
over the totals of the whole minibatch, that sum is the whole minibatch's gradient, however the rows lie.

All ranks make the same calls in the same order; a rank that has nothing to do makes them on nothing.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of the learner's processes this is. One alone needs none of it: every method is then the identity."""

    index: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.index == 0

    def shard(self, model: Any) -> Any:
        """The model, its layers sharded over the ranks; from here on its parameters are `DTensor`s."""
        if self.mesh is None:
            return model
        for block in _blocks(model):
            fully_shard(block, mesh=self.mesh)
        return fully_shard(model, mesh=self.mesh)

    def as_forward(self, model: Any, function: Function) -> Function:
        """`function`, which uses the model's parts, with the weights gathered as for the model's own forward pass.

        It has to return a tuple of tensors: their gradients say when the weights are needed again.
        """
        if not isinstance(model, FSDPModule):
            return function
        sharded: Any = model
        sharded._as_forward = function
        register_fsdp_forward_method(sharded, "_as_forward")
        gathered: Function = sharded._as_forward
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what each gives, elementwise."""
        if self.mesh is None:
            return x
        total = x.to(torch.int32) if x.dtype == torch.bool else x.clone()
        dist.all_reduce(total, group=self.mesh.get_group())
        return total.to(x.dtype)

    def whole(self, tensor: Tensor) -> Tensor:
        """A sharded tensor put together, on every rank."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def like(self, tensor: Tensor, whole: Tensor) -> Tensor:
        """This rank's shard of a whole tensor, sharded as another is; without asking the other ranks."""
        if not isinstance(tensor, DTensor):
            return whole
        on_device = whole.to(tensor.device_mesh.device_type)
        return distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)

    def close(self) -> None:
        """Ends it, once all ranks are here: one that left earlier would tear the others down."""
        if self.mesh is not None:
            dist.barrier(group=self.mesh.get_group())
            dist.destroy_process_group()


def join_ranks(index: int, count: int, meeting_point: str | None, *, deadline_s: float) -> Ranks:
    """Returns once all ranks have come to `meeting_point`, the first one's `host:port`; raises after the deadline."""
    if count == 1:
        return Ranks()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{meeting_point}",
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=deadline_s),
    )
    return Ranks(index, count, init_device_mesh("cuda" if on_gpu else "cpu", (count,)))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the longest list of modules in it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
