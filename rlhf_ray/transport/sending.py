"""The sender's end of a hand-over."""

from collections.abc import Generator, Iterable, Sequence

from rlhf_ray.transport.parcels import PARCEL_BYTES, Digest, Named, Parcel, Sent, bundles, pieces_of
from rlhf_ray.transport.transports import Transport


class Sender:
    """Sends weights, hand-over after hand-over, by one transport."""

    def __init__(self, transport: Transport, *, parcel_bytes: int = PARCEL_BYTES) -> None:
        self.transport, self.parcel_bytes = transport, parcel_bytes

    def send(
        self, weights: Iterable[Named], to: Sequence[str], *, weights_step: int, over_base: bool = False
    ) -> Generator[Parcel, None, Sent]:
        """Parcel after parcel, each to be passed on to every receiver at once; returns what was sent in all.

        `weights` may be made one by one, but must not change before this has returned.
        """
        digest, total = Digest(), 0
        if self.transport.from_memory:
            weights = ((name, tensor.cpu()) for name, tensor in weights)
        self.transport.begin(to)
        for number, (bundle, last) in enumerate(bundles(weights, parcel_bytes=self.parcel_bytes)):
            digest.add(bundle)
            pieces = pieces_of(bundle)
            contents = self.transport.pack([tensor for _, tensor in bundle])
            yield Parcel(self.transport.name, weights_step, number, last, pieces, contents, over_base)
            self.transport.deliver()
            total += sum(piece.bytes for piece in pieces)
        return Sent(weights_step, digest.result(), total)
