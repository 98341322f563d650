"""Weights on their way from the learner to the generators, and the rule that they go by."""

import hashlib
import json
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.errors import WeightsMismatch
from rlhf_ray.types import Sampling, WeightsReceipt

CACHE_BLOCK = 128
"""Tokens in one block of vLLM's prefix cache on CPU (16 on GPU); shorter prompts are never read from the cache."""
PROBE_TOKENS = 4
"""Sampled and compared for each probe: the first by reading a prompt, the others one by one, as in all sampling."""
FRESH_TOKENS = 8
"""Of a probe's prompt, that no earlier step had."""
TOLERANCE = 1e-4
"""Nats; in float32 an engine that held the learner's weights was within 2e-6 of it on a small random policy."""
_ALIGN = 64


class Piece(NamedTuple):
    """Where one tensor lies in the buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name for it: "float32"."""
    offset: int
    """In bytes."""


@dataclass(frozen=True, slots=True)
class FlatWeights:
    """All weights of one step in one buffer, which Ray's object store passes on without a copy."""

    buffer: NDArray[np.uint8]
    index: tuple[Piece, ...]
    weights_step: int
    sha256: str
    """Over index and buffer."""


@dataclass(frozen=True, slots=True)
class PushedWeights:
    """Weights that lie ready for the generators."""

    handle: Any
    """What a generator is given: a Ray object reference, or the `FlatWeights` themselves."""
    weights_step: int
    sha256: str
    bytes: int


def flatten(state_dict: Mapping[str, Tensor], step: int) -> FlatWeights:
    """One buffer of a model's `state_dict()`: tied tensors are sent under each of their names."""
    pieces, end = [], 0
    for name, tensor in state_dict.items():
        pieces.append(Piece(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), end))
        end += -(-tensor.nbytes // _ALIGN) * _ALIGN
    buffer = np.zeros(end, dtype=np.uint8)
    for piece, tensor in zip(pieces, state_dict.values(), strict=True):
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        buffer[piece.offset : piece.offset + flat.nbytes] = flat
    index = tuple(pieces)
    return FlatWeights(buffer, index, step, digest(index, buffer))


def unflatten(flat: FlatWeights) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, as views into the buffer: read them, do not write."""
    for name, shape, dtype_name, offset in flat.index:
        dtype: torch.dtype = getattr(torch, dtype_name)
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            yield name, torch.empty(shape, dtype=dtype)
            continue
        with warnings.catch_warnings():  # Ray's buffers are read-only, and torch says so for each
            warnings.simplefilter("ignore", UserWarning)
            view = torch.frombuffer(flat.buffer, dtype=dtype, count=count, offset=offset)
        yield name, view.view(shape)


def digest(index: Sequence[Piece], buffer: NDArray[np.uint8]) -> str:
    """sha256 over what is where and over every byte of it."""
    sha = hashlib.sha256(json.dumps(index).encode())
    sha.update(buffer.data)
    return sha.hexdigest()


class ProbeAnswer(Protocol):
    """A response to a probe; `generator.Sampled`."""

    @property
    def ids(self) -> tuple[int, ...]:
        """(T)"""

    @property
    def logprobs(self) -> tuple[float, ...]:
        """(T)"""


class WeightsSource(Protocol):
    """The learner, as the hand-off sees it."""

    def push_weights(self) -> PushedWeights:
        """Lays the policy's weights ready, as they stand."""

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probs of each (prompt, response)'s response tokens under the policy as it stands."""


class WeightsSinks(Protocol):
    """All generators, as the hand-off sees them; each answer is by generator name."""

    def load_weights(self, pushed: PushedWeights) -> Mapping[str, WeightsReceipt]:
        """Every generator loads, none may sample."""

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Mapping[str, Sequence[ProbeAnswer]]:
        """Every generator answers every prompt with the weights that it has loaded."""

    def release(self, weights_step: int) -> None:
        """Every generator may sample."""


class WeightsHandoff:
    """The one owner of the rule by which weights reach the generators. `publish` calls, in this order:

    1. push: the learner lays its weights ready, with their hash.
    2. load: every generator loads them and returns a receipt; from here on none of them may sample.
    3. verify: each receipt's hash, taken over the bytes received, is the learner's; then every generator answers
       probe prompts, and the learner's log-probs of those answers differ from the generator's own by at most
       `tolerance`. So loading is proven, not only transport.
    4. release: the generators may sample; the pushed buffer is dropped.

    Where a step fails, the ones after it do not happen: no generator samples with weights in doubt. A generator that
    comes late goes through all four by itself.
    """

    def __init__(
        self,
        learner: WeightsSource,
        generators: WeightsSinks,
        *,
        vocabulary: int,
        context: int,
        seed: int = 0,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.learner = learner
        self.generators = generators
        self.vocabulary = vocabulary
        self.context = context
        self.seed = seed
        self.tolerance = tolerance

    def publish(self, weights_step: int, *, to: WeightsSinks | None = None) -> dict[str, float]:
        """Brings the generators, or those of them in `to`, to the learner's weights of this step.

        Returns the `sync/` metrics; raises `WeightsMismatch` with the expected and the found figure.
        """
        generators = self.generators if to is None else to
        start = time.monotonic()
        pushed = self.learner.push_weights()
        assert pushed.weights_step == weights_step, f"learner is at step {pushed.weights_step}, not {weights_step}"
        receipts = generators.load_weights(pushed)
        check_receipts(receipts, pushed)
        worst = self._verify(generators, weights_step)
        generators.release(weights_step)
        return {
            "sync/bytes": float(pushed.bytes),
            "sync/seconds": time.monotonic() - start,
            "sync/verified": 1.0,
            "sync/probe_max_abs": worst,
        }

    def _verify(self, generators: WeightsSinks, weights_step: int) -> float:
        """The largest difference over all probes and generators."""
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=PROBE_TOKENS)
        prompts = probe_prompts(weights_step, vocabulary=self.vocabulary, context=self.context, seed=self.seed)
        seeds = [random.Random(f"{self.seed}/{weights_step}/{i}").getrandbits(31) for i in range(len(prompts))]
        probes = generators.probe(prompts, sampling, seeds=seeds)
        worst = 0.0
        for name, answers in probes.items():
            sequences = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
            expected = self.learner.logprobs_of(sequences, sampling)
            found = [answer.logprobs for answer in answers]
            worst = max(worst, check_probe(name, weights_step, expected, found, tolerance=self.tolerance))
        return worst


def probe_prompts(weights_step: int, *, vocabulary: int, context: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens that tell weights apart; all of them end otherwise at every step.

    The first begins the same at every step, for as long as one cache block: that would be read from a prefix cache
    that outlived its weights. In a context without room for a block nothing is ever cached. The second is short and
    all fresh, so that nothing of it can have been computed before.
    """
    room = max(1, context - PROBE_TOKENS)
    standing = min(CACHE_BLOCK, max(0, room - FRESH_TOKENS))
    fresh = min(FRESH_TOKENS, room)
    names = [(f"{seed}/standing", standing), *((f"{seed}/step {weights_step}/{i}", fresh) for i in range(2))]
    block, tail, other = (
        [draw.randrange(vocabulary) for _ in range(n)] for draw, n in ((random.Random(k), n) for k, n in names)
    )
    return [block + tail, other]


def check_receipts(receipts: Mapping[str, WeightsReceipt], pushed: PushedWeights) -> None:
    """Raises `WeightsMismatch` unless every generator received exactly what the learner sent."""
    for name, receipt in receipts.items():
        if (receipt.sha256, receipt.weights_step) != (pushed.sha256, pushed.weights_step):
            raise WeightsMismatch(
                f"{name} does not hold the learner's weights: expected step {pushed.weights_step} with sha256 "
                f"{pushed.sha256}, got step {receipt.weights_step} with sha256 {receipt.sha256}"
            )


def check_probe(
    name: str,
    weights_step: int,
    expected: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    *,
    tolerance: float,
) -> float:
    """The largest absolute difference; raises `WeightsMismatch` where it passes the tolerance or is no number."""
    worst, place = 0.0, (0, 0)
    for row, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        for token, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            difference = abs(own - other)
            if not difference <= worst:  # NaN is the worst of all
                worst, place = difference, (row, token)
    if not worst <= tolerance:
        row, token = place
        raise WeightsMismatch(
            f"{name} does not sample with the learner's weights of step {weights_step}: on probe {row}, token {token}, "
            f"the learner's log-prob (expected) is {expected[row][token]:.6f}, the generator's (got) "
            f"{found[row][token]:.6f}; they differ by {worst:.2g}, at most {tolerance:.2g} is allowed"
        )
    return worst
