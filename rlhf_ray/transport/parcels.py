"""What is sent: a policy's weights, cut into parcels of consecutive tensors, with one hash over all of them.

Both ends take the hash in a thread, beside what they do with the tensors.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

TransportName = Literal["object_store", "gloo", "nccl", "cuda_ipc"]
PARCEL_BYTES = 64 * 2**20
"""A parcel is full once it holds as much; a larger tensor is a parcel by itself."""
FIRST_BYTES = 4 * 2**20
"""The first parcel, so that receivers begin soon; each after it may hold twice as much as the one before."""
Named = tuple[str, Tensor]
"""A tensor under the name that a checkpoint has for it."""


class Piece(NamedTuple):
    """One tensor of a parcel, without its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name for it: "float32"."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch's own object of that name."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        """What the tensor takes."""
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()


class Parcel(NamedTuple):
    """Some of the weights of a step."""

    transport: TransportName
    """Which way it comes."""
    weights_step: int
    number: int
    """From 0, in the order in which they are sent."""
    last: bool
    pieces: tuple[Piece, ...]
    contents: Any
    """The bytes of the pieces, or what the transport needs to get at them."""
    over_base: bool = False
    """Whether the tensors are an adapter, to be laid over the weights of the receiver's own model folder."""


class Sent(NamedTuple):
    """What the sender has sent, once it has."""

    weights_step: int
    sha256: str
    bytes: int


class Receiver(NamedTuple):
    """Who takes parcels in: one of a generator's processes."""

    name: str
    worker: int = 0
    """Of an engine that is several processes, which one."""
    device: torch.device = torch.device("cpu")


def pieces_of(bundle: Sequence[Named]) -> tuple[Piece, ...]:
    """What a bundle holds, without the bytes."""
    return tuple(Piece(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in bundle)


def bundles(weights: Iterable[Named], *, parcel_bytes: int = PARCEL_BYTES) -> Iterator[tuple[list[Named], bool]]:
    """The tensors of each parcel, and whether it is the last one; no tensor is looked at before it is its turn."""
    bundle: list[Named] = []
    held, room = 0, min(FIRST_BYTES, parcel_bytes)
    for name, tensor in weights:
        bundle.append((name, tensor.detach().contiguous()))
        held += tensor.nbytes
        if held >= room:
            yield bundle, False
            bundle, held, room = [], 0, min(2 * room, parcel_bytes)
    yield bundle, True


class Digest:
    """sha256 over named tensors in their order, taken in a thread of its own.

    Of a tensor on a GPU it takes in a fingerprint that the GPU computes: its bytes would have to come down first.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._pending: list[Any] = []

    def add(self, bundle: Sequence[Named]) -> None:
        """Takes these in; they have to stay as they are until `result`."""
        self._pending.append(self._beside.submit(self._take, bundle))

    def result(self) -> str:
        """The hash of everything; nothing may be added after it."""
        for taken in self._pending:
            taken.result()
        self._beside.shutdown()
        return self._sha.hexdigest()

    def _take(self, bundle: Sequence[Named]) -> None:
        for named in bundle:
            take_in(self._sha, named)


def take_in(sha: Any, named: Named) -> None:
    """Adds a tensor to a hash: its name, shape, dtype and bytes, or what stands for them on a GPU."""
    (piece,), flat = pieces_of([named]), raw(named[1])
    sha.update(json.dumps(piece).encode())
    sha.update(fingerprint(flat) if flat.is_cuda else flat.numpy().data)


def raw(tensor: Tensor) -> Tensor:
    """(bytes) a contiguous tensor as uint8, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def fingerprint(flat: Tensor) -> bytes:
    """8 bytes that follow from every byte of a (bytes) uint8 tensor and from its place.

    The sum modulo 2^64 of its 8-byte words, each moved by its place and mixed by the finaliser of SplitMix64 (Steele,
    Lea and Flood 2014, doi:10.1145/2714064.2660195). Against mistakes, not against malice.
    """
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    mixed = words + _signed(0x9E3779B97F4A7C15) * torch.arange(1, len(words) + 1, device=flat.device)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return int((mixed ^ _shifted(mixed, 31)).sum()).to_bytes(8, "little", signed=True)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """Zeros come in from above."""
    return (words >> by) & ((1 << (64 - by)) - 1)
