"""The rule by which the learner's weights reach the generators, and the proof that they have."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from rlhf_ray.errors import TransferBroken, WeightsMismatch
from rlhf_ray.transport.parcels import Sent
from rlhf_ray.types import Sampling, WeightsReceipt

CACHE_BLOCK = 32
"""Tokens in one block of an engine's prefix cache; shorter prompts are never read from the cache."""
PROBE_TOKENS = 2
"""Sampled and compared for each probe: the first by reading a prompt, the other from its cache, as in all sampling."""
FRESH_TOKENS = 8
"""Of a probe's prompt, that no earlier step had."""
TOLERANCE = 1e-4
"""Nats; in float32 an engine that held the learner's weights was within 2e-6 of it on a small random policy."""
MISMATCHES = 3
"""In a row, after which a run stops even where a generator that does not hold the weights is only retired."""


class ProbeAnswer(Protocol):
    """A response to a probe; `generator.Sampled`."""

    @property
    def ids(self) -> tuple[int, ...]:
        """(T)"""

    @property
    def logprobs(self) -> tuple[float, ...]:
        """(T)"""


class Push(Protocol):
    """Weights on their way out of the learner."""

    def __iter__(self) -> Iterator[Any]:
        """Parcels, or references to them, as they come; each goes to every receiver at once."""

    @property
    def sent(self) -> Sent:
        """What was sent in all, once the last parcel is out."""


class WeightsSource(Protocol):
    """The learner, as the hand-off sees it."""

    def push_weights(self, to: Sequence[str]) -> Push:
        """Begins to send the policy's weights, as they stand, to the generators of these names."""

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probs of each (prompt, response)'s response tokens under the policy as it stands."""


class WeightsSinks(Protocol):
    """All generators, as the hand-off sees them; each answer is by generator name."""

    def names(self) -> Sequence[str]:
        """Those that are there, as far as is known."""

    def answering(self) -> Sequence[str]:
        """Those that are there and answer."""

    def load_weights(self, pushed: Push) -> Mapping[str, WeightsReceipt]:
        """Every generator loads, none may sample."""

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Mapping[str, Sequence[ProbeAnswer]]:
        """Every generator answers every prompt with the weights that it has loaded."""

    def release(self, weights_step: int) -> None:
        """Every generator may sample."""

    def retire(self, name: str, error: WeightsMismatch) -> None:
        """Ends a generator that does not hold what it was sent; another is asked for in its place."""


class WeightsHandoff:
    """The one owner of the rule by which weights reach the generators. `publish` calls, in this order:

    1. push: the learner sends its weights, parcel by parcel, and takes their hash.
    2. load: every generator loads them as they come and returns a receipt; from here on none of them may sample.
    3. verify: each receipt's hash, taken over the bytes received, is the learner's; then every generator answers
       probe prompts, and the learner's log-probs of those answers differ from the generator's own by at most
       `tolerance`. So loading is proven, not only transport.
    4. release: the generators may sample.

    Where a step fails, the ones after it do not happen: no generator samples with weights in doubt. A generator that
    comes late goes through all four by itself. One that does not hold the weights stops the run, or with
    `on_mismatch="retire"` is ended and replaced, until that has happened in `MISMATCHES` hand-overs in a row.
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
        on_mismatch: Literal["stop", "retire"] = "stop",
    ) -> None:
        self.learner = learner
        self.generators = generators
        self.vocabulary = vocabulary
        self.context = context
        self.seed = seed
        self.tolerance = tolerance
        self.on_mismatch = on_mismatch
        self._mismatches = 0
        """Hand-overs in a row in which a generator was found out."""

    def publish(self, weights_step: int, *, to: WeightsSinks | None = None) -> dict[str, float]:
        """Brings the generators, or those of them in `to`, to the learner's weights of this step.

        Returns the `sync/` metrics; raises `WeightsMismatch` with the expected and the found figure.
        """
        generators = self.generators if to is None else to
        start = time.monotonic()
        sent, receipts = self._transfer(generators)
        assert sent.weights_step == weights_step, f"learner is at step {sent.weights_step}, not {weights_step}"
        found_out = check_receipts(receipts, sent)
        self._retire(generators, found_out)
        worst, others = self._verify(generators, weights_step)
        self._retire(generators, others)
        self._mismatches = self._mismatches + 1 if found_out or others else 0
        generators.release(weights_step)
        return {
            "sync/bytes": float(sent.bytes),
            "sync/seconds": time.monotonic() - start,
            "sync/verified": 1.0,
            "sync/probe_max_abs": worst,
            "sync/retired": float(len(found_out) + len(others)),
        }

    def _transfer(self, generators: WeightsSinks) -> tuple[Sent, Mapping[str, WeightsReceipt]]:
        """Sends and loads; once more without those who are gone, where a transport needs all of them and loses one."""
        names = generators.names()
        while True:
            pushed = self.learner.push_weights(names)
            try:
                receipts = generators.load_weights(pushed)
            except TransferBroken:
                before, names = names, generators.answering()
                if names == before:
                    raise
            else:
                return pushed.sent, receipts

    def _verify(self, generators: WeightsSinks, weights_step: int) -> tuple[float, dict[str, WeightsMismatch]]:
        """The largest difference over all probes and generators that pass, and those that do not."""
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=PROBE_TOKENS)
        prompts = probe_prompts(weights_step, vocabulary=self.vocabulary, context=self.context, seed=self.seed)
        seeds = [random.Random(f"{self.seed}/{weights_step}/{i}").getrandbits(31) for i in range(len(prompts))]
        probes = generators.probe(prompts, sampling, seeds=seeds)
        worst, found_out = 0.0, {}
        for name, answers in probes.items():
            sequences = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
            expected = self.learner.logprobs_of(sequences, sampling)
            found = [answer.logprobs for answer in answers]
            try:
                worst = max(worst, check_probe(name, weights_step, expected, found, tolerance=self.tolerance))
            except WeightsMismatch as error:
                found_out[name] = error
        return worst, found_out

    def _retire(self, generators: WeightsSinks, found_out: Mapping[str, WeightsMismatch]) -> None:
        for name, error in found_out.items():
            if self.on_mismatch == "stop" or self._mismatches + 1 >= MISMATCHES:
                raise error
            generators.retire(name, error)


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


def check_receipts(receipts: Mapping[str, WeightsReceipt], sent: Sent) -> dict[str, WeightsMismatch]:
    """The generators that did not receive exactly what the learner sent."""
    return {
        name: WeightsMismatch(
            f"{name} does not hold the learner's weights: expected step {sent.weights_step} with sha256 {sent.sha256}, "
            f"got step {receipt.weights_step} with sha256 {receipt.sha256}"
        )
        for name, receipt in receipts.items()
        if (receipt.sha256, receipt.weights_step) != (sent.sha256, sent.weights_step)
    }


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
