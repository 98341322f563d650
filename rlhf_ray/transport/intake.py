"""A receiver's end of a hand-over."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from rlhf_ray.models.stored import laid_over
from rlhf_ray.transport.parcels import Digest, Named, Parcel, Receiver
from rlhf_ray.transport.transports import Transport, make_transport


class Intake:
    """Unpacks parcels and hashes them; made once for all hand-overs."""

    def __init__(self, receiver: Receiver, *, base: Path | None = None) -> None:
        """`base`: the model folder that an adapter is laid over."""
        self.receiver, self.base = receiver, base
        self._transports: dict[str, Transport] = {}
        self._digest = Digest()
        self._next = 0
        self._adapter: dict[str, Tensor] = {}

    def take(self, parcel: Parcel) -> Iterable[Named]:
        """The weights that have become known with this parcel; the tensors are only to be read.

        With an adapter they are the whole model's, once its last parcel is there.
        """
        if parcel.number == 0:
            self._digest, self._next, self._adapter = Digest(), 0, {}
        assert parcel.number == self._next, f"parcel {parcel.number} came where {self._next} was due"
        self._next += 1
        if parcel.transport not in self._transports:
            self._transports[parcel.transport] = make_transport(parcel.transport)
        tensors = self._transports[parcel.transport].unpack(parcel.pieces, parcel.contents, self.receiver)
        bundle = [(piece.name, tensor) for piece, tensor in zip(parcel.pieces, tensors, strict=True)]
        self._digest.add(bundle)
        if not parcel.over_base:
            return bundle
        self._adapter.update(bundle)
        assert self.base is not None, "an adapter came to a receiver without a base"
        return laid_over(self.base, self._adapter) if parcel.last else []

    def sha256(self) -> str:
        """Over all tensors since the first parcel."""
        return self._digest.result()
