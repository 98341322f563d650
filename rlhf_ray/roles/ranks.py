"""A learner on several processes: each holds a shard of every network and learns from its own share of each minibatch.

Networks are sharded by torch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277): a layer's weights are
gathered when it is computed, and its gradient is summed over the ranks and scattered again. Because every loss is taken
over the totals of the whole minibatch, that sum is the whole minibatch's gradient, however the rows lie.

All ranks make the same calls in the same order; a rank that has nothing to do makes them on nothing.
"""

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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

    def shard(self, model: Any, *, dtype: torch.dtype = torch.float32, offload: bool = False) -> Any:
        """The model, its layers sharded over the ranks; from here on its parameters are `DTensor`s.

        It computes in `dtype`, from weights that stay what they are. With `offload` those, their gradients and with
        them the optimizer lie in the machine's memory, and each layer comes to the GPU when it is computed.
        """
        if self.mesh is None:
            return model
        # outputs that are views are only read here
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        for block in _blocks(model):
            fully_shard(block, **options)
        return fully_shard(model, **options)

    def as_forward(self, model: Any, function: Function) -> Function:
        """`function`, which uses the model's parts, with the weights gathered as for the model's own forward pass.

        It has to return a tuple of tensors: their gradients say when the weights are needed again.
        """
        if not is_sharded(model):
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
        shard = distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
        return shard.to(tensor.device)  # a mesh's device is not where offloaded ones lie

    def read(self, like: Tensor, rows: Callable[[int, int], Tensor]) -> Tensor:
        """This rank's shard of a weight of which `rows(start, stop)` reads some rows; `like` has none yet."""
        assert isinstance(like, DTensor), "only what is sharded is read in shards"
        mesh, placements = like.device_mesh, like.placements
        shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
        local = rows(offset[0], offset[0] + shape[0]).to(mesh.device_type, like.dtype)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def join_ranks(index: int, count: int, meeting_point: str | None, *, deadline_s: float) -> Ranks:
    """Returns once all ranks have come to `meeting_point`, the first one's `host:port`; raises after the deadline."""
    if count == 1:
        return Ranks()
    dist.init_process_group(
        _backends(),
        init_method=f"tcp://{meeting_point}",
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=deadline_s),
    )
    return Ranks(index, count, _mesh(count))


class Meeting:
    """Where ranks of a task find each other, kept by whoever starts them: nobody else knows where each will be."""

    def __init__(self, host: str) -> None:
        """host: what other machines call this one."""
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.point = f"{host}:{self._store.port}"


def as_rank(
    function: Callable[..., Any],
    index: int,
    count: int,
    meeting_point: str,
    deadline_s: float,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`function(*args, **kwargs)` as one of several ranks that make one torch process group, in a process of its own.

    transformers' Trainer is told of it by the variables of torchrun.
    """
    host, _, port = meeting_point.rpartition(":")
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": "0",  # each sees its own GPU alone
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    patience = timedelta(seconds=deadline_s)
    store = TCPStore(host, int(port), is_master=False, timeout=patience)
    dist.init_process_group(_backends(), store=store, rank=index, world_size=count, timeout=patience)
    return function(*args, **kwargs)


def rank_and_count() -> tuple[int, int]:
    """This process' among those of its group; 0 of 1 where it has none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_sharded(model: object) -> bool:
    """Whether `Ranks.shard` has sharded it."""
    return isinstance(model, FSDPModule)


def shard_alone() -> Ranks:
    """One rank that can shard all the same: for what is offloaded."""
    if not dist.is_initialized():
        dist.init_process_group(_backends(), store=HashStore(), rank=0, world_size=1)
    return Ranks(0, 1, _mesh(1))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _backends() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _mesh(count: int) -> DeviceMesh:
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (count,))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the longest list of modules in it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
