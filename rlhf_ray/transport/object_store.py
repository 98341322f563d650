"""Through Ray's object store: a parcel carries its bytes, which every receiver on a node reads where they lie."""

import warnings
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.transport.parcels import Piece, Receiver, TransportName, raw


class ObjectStore:
    """For receivers that may come and go; on CPU nothing is copied but into the store."""

    name: ClassVar[TransportName] = "object_store"
    from_memory: ClassVar[bool] = True

    def begin(self, to: Sequence[str]) -> None:
        """Nothing: whoever has a reference reads."""

    def pack(self, tensors: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
        """The bytes of each tensor; numpy's arrays go into Ray's shared memory and out of it as they are."""
        return [raw(tensor).cpu().numpy() for tensor in tensors]

    def deliver(self) -> None:
        """Nothing: the store keeps a parcel until it has been read."""

    def unpack(
        self, pieces: Sequence[Piece], contents: Sequence[NDArray[np.uint8]], receiver: Receiver
    ) -> list[Tensor]:
        """Views into the store."""
        return [self._view(piece, flat) for piece, flat in zip(pieces, contents, strict=True)]

    def _view(self, piece: Piece, flat: NDArray[np.uint8]) -> Tensor:
        if not len(flat):
            return torch.empty(piece.shape, dtype=piece.torch_dtype)
        with warnings.catch_warnings():  # what lies in the store is read-only, and torch says so for each
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(flat).view(piece.torch_dtype).view(piece.shape)
