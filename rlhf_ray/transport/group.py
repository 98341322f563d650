"""Broadcast from the sender to all receivers at once, in a process group of their own: gloo on CPU, NCCL on GPU.

Whoever is to receive is named with each parcel. Where that is not who received last, a new group meets first, at a
port that the sender opens; its place comes with the parcel.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rlhf_ray.errors import TransferBroken
from rlhf_ray.transport.parcels import Piece, Receiver, TransportName, raw

_ALIGN = 16
"""Bytes: where a tensor begins in a parcel, so that it can be looked at as numbers of any size."""


class Meeting(NamedTuple):
    """Where a group meets, and who belongs to it: the sender first, then each receiver's workers."""

    host: str
    port: int
    receivers: tuple[str, ...]
    workers: int
    """Processes of each receiver."""
    deadline_s: float

    @property
    def size(self) -> int:
        """Processes in all."""
        return 1 + self.workers * len(self.receivers)

    def place(self, receiver: Receiver) -> int:
        """A receiver's number in the group."""
        return 1 + self.receivers.index(receiver.name) * self.workers + receiver.worker


class GroupTransport(ABC):
    """See the module; the backends differ in the group alone."""

    name: ClassVar[TransportName]
    from_memory: ClassVar[bool]

    def __init__(self, *, host: str = "", workers: int = 1, deadline_s: float = 300.0) -> None:
        """At a sender: the address at which receivers find it, and how many processes each of them is."""
        self.host, self.workers, self.deadline_s = host, workers, deadline_s
        self._meeting: Meeting | None = None
        self._store: TCPStore | None = None
        self._group: Any = None
        self._flat = torch.empty(0, dtype=torch.uint8)

    def begin(self, to: Sequence[str]) -> None:
        """Opens a port for another group, where these are not the ones of the last hand-over."""
        if self._meeting is None or self._meeting.receivers != tuple(to):
            self._open(tuple(to))

    def pack(self, tensors: Sequence[Tensor]) -> Meeting:
        """Keeps the bytes for `deliver`; the parcel says where the receivers meet the sender."""
        assert self._meeting is not None, "begin comes first"
        self._flat = torch.cat([_padded(raw(tensor)) for tensor in tensors]) if tensors else self._flat[:0]
        return self._meeting

    def deliver(self) -> None:
        """Sends the bytes to all, once all have come; `TransferBroken` where one does not."""
        if self._meeting is not None and self._meeting.receivers:
            self._broadcast(self._flat, place=0)

    def unpack(self, pieces: Sequence[Piece], contents: Meeting, receiver: Receiver) -> list[Tensor]:
        """Receives the bytes; `TransferBroken` where they do not come."""
        if contents != self._meeting:
            self._leave()
            self._meeting = contents
        sizes = [_aligned(piece.bytes) for piece in pieces]
        device = "cpu" if self.from_memory else receiver.device
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._broadcast(flat, place=contents.place(receiver))
        return [
            part[: piece.bytes].view(piece.torch_dtype).view(piece.shape)
            for piece, part in zip(pieces, flat.split(sizes), strict=True)
        ]

    def _open(self, receivers: tuple[str, ...]) -> None:
        self._leave()
        deadline = timedelta(seconds=self.deadline_s)
        size = 1 + self.workers * len(receivers)
        self._store = TCPStore(self.host, 0, size, is_master=True, timeout=deadline, wait_for_workers=False)
        self._meeting = Meeting(self.host, self._store.port, receivers, self.workers, self.deadline_s)

    def _broadcast(self, flat: Tensor, *, place: int) -> None:
        assert self._meeting is not None
        try:
            if self._group is None:
                self._group = self._meet(self._meeting, place)
            if len(flat):
                self._group.broadcast(flat, 0).wait()
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
        except (RuntimeError, dist.DistError) as error:
            self._leave()
            reason = str(error).strip().splitlines()[0]
            raise TransferBroken(f"weights did not get through by {self.name}: {reason}") from error

    def _meet(self, meeting: Meeting, place: int) -> Any:
        deadline = timedelta(seconds=meeting.deadline_s)
        if self._store is None:
            self._store = TCPStore(meeting.host, meeting.port, meeting.size, timeout=deadline)
        return self._make_group(PrefixStore("weights", self._store), place, meeting.size, deadline)

    @abstractmethod
    def _make_group(self, store: Store, place: int, size: int, deadline: timedelta) -> Any:
        """torch's process group of this backend."""

    def _leave(self) -> None:
        self._group = self._store = self._meeting = None


class Gloo(GroupTransport):
    """Over the network, from memory to memory."""

    name: ClassVar[TransportName] = "gloo"
    from_memory: ClassVar[bool] = True

    def _make_group(self, store: Store, place: int, size: int, deadline: timedelta) -> Any:
        return dist.ProcessGroupGloo(store, place, size, deadline)


class NCCL(GroupTransport):
    """From GPU to GPU."""

    name: ClassVar[TransportName] = "nccl"
    from_memory: ClassVar[bool] = False

    def _make_group(self, store: Store, place: int, size: int, deadline: timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = deadline
        return dist.ProcessGroupNCCL(store, place, size, options)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _padded(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, _aligned(len(flat)) - len(flat)))
