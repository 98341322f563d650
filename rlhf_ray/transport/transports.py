"""The ways in which parcels travel. A receiver learns from each parcel which one it came by."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from rlhf_ray.transport.cuda_ipc import CudaIPC
from rlhf_ray.transport.group import NCCL, Gloo
from rlhf_ray.transport.object_store import ObjectStore
from rlhf_ray.transport.parcels import Piece, Receiver, TransportName


class Transport(Protocol):
    """One end of a way: the sender's, or a receiver's, which only unpacks."""

    name: ClassVar[TransportName]
    from_memory: ClassVar[bool]
    """Whether tensors travel from the machine's memory and to it, wherever they are used."""

    def begin(self, to: Sequence[str]) -> None:
        """Before the first parcel of a hand-over, which goes to the receivers of these names."""

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """What a parcel of these carries; it can be pickled."""

    def deliver(self) -> None:
        """Once what was packed last is on its way: does what takes both ends at the same time."""

    def unpack(self, pieces: Sequence[Piece], contents: Any, receiver: Receiver) -> list[Tensor]:
        """The tensors, which are only to be read. Their bytes are there; whether the right ones, the hash says."""


def make_transport(name: TransportName, *, host: str = "", workers: int = 1, deadline_s: float = 300.0) -> Transport:
    """An end of its own; a sender says at which address it is found, how many processes a receiver is, and how long
    it waits for them.
    """
    if name == "object_store":
        return ObjectStore()
    if name == "cuda_ipc":
        return CudaIPC()
    kind = Gloo if name == "gloo" else NCCL
    return kind(host=host, workers=workers, deadline_s=deadline_s)
