"""Between processes on one GPU: a parcel carries a handle on the sender's own memory."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rlhf_ray.transport.parcels import Piece, Receiver, TransportName

_DEVICE = 6
"""Which of a handle's parts is the number that the sender's process knows its GPU by."""


class CudaIPC:
    """For generators on the learner's own GPU; nothing is copied on the way."""

    name: ClassVar[TransportName] = "cuda_ipc"
    from_memory: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lent: list[Tensor] = []

    def begin(self, to: Sequence[str]) -> None:
        """Takes back what was lent in the hand-over before, which all receivers have read by now."""
        self._lent = []

    def pack(self, tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """Handles on each tensor, whose memory is kept until the next `begin`: a handle does not keep it."""
        self._lent += tensors
        torch.cuda.synchronize()
        return [reduce_tensor(tensor)[1] for tensor in tensors]

    def deliver(self) -> None:
        """Nothing: receivers look where the bytes lie."""

    def unpack(self, pieces: Sequence[Piece], contents: Sequence[tuple[Any, ...]], receiver: Receiver) -> list[Tensor]:
        """Views into the sender's memory."""
        own = receiver.device.index
        handles = ((*handle[:_DEVICE], own, *handle[_DEVICE + 1 :]) for handle in contents)
        return [rebuild_cuda_tensor(*handle) for handle in handles]
