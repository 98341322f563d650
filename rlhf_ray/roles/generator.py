"""The generator: prompts in, rollouts out, each stamped with the weights step that sampled it."""

import itertools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.transport.parcels import Parcel
from rlhf_ray.types import FinishReason, GenerationRequest, Rollout, Sampling, Span, WeightsReceipt


class Sampled(NamedTuple):
    """One response as an engine gives it."""

    ids: tuple[int, ...]
    """(T); ends with the end token, or one of `Sampling.stop_ids`, where `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    """(T) of the distribution sampled from, after temperature and top-p."""
    finish_reason: FinishReason
    spans: tuple[Span, ...]
    """Which weights step sampled which tokens; the first one starts at 0."""


class Engine(Protocol):
    """What samples: vLLM (`vllm_engine.py`), or a fake in tests. It goes on only when it is stepped."""

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        """Queues a prompt; equal seeds draw equal numbers."""

    def step(self) -> list[tuple[str, Sampled]]:
        """One token more for each response under way, begun or not; those that ended with it, by id."""

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""

    def load(self, parcel: Parcel, receiver: str) -> str | None:
        """Takes in a parcel of new weights, meant for the generator of this name; with the last one the sha256 of all
        that were received.

        By then all weights are replaced, and whatever was computed with the old ones is forgotten. Responses under way
        stay so.
        """

    def stamp(self, weights_step: int) -> None:
        """From here on tokens are sampled with this step's weights."""

    def sleep(self) -> None:
        """Gives its memory up until `wake`, after which it has to `load`."""

    def wake(self) -> None:
        """Takes its memory again."""


class Turn(NamedTuple):
    """What a generator has to show for a turn."""

    rollouts: list[Rollout]
    under_way: int
    """Rollouts that it was asked for and has not given yet."""


class Generator:
    """An engine that samples only with weights known to be the right ones.

    With a `weights_step` the weights that the engine has read from its model folder count as that step. Without one,
    and after every `load_weights`, it takes no requests until the hand-off has verified what it holds and released it.
    What is under way when weights are swapped goes on with the new ones, beside the probes that verify them; whatever
    ends before the release is held back until then.
    """

    def __init__(self, engine: Engine, *, name: str = "generator", weights_step: int | None = None) -> None:
        self.engine = engine
        self.name = name
        self.weights_step = weights_step
        self.released = weights_step is not None
        self._under_way: dict[str, GenerationRequest] = {}
        self._ended: list[Rollout] = []
        self._probe_numbers = itertools.count()
        self._loading_since = 0.0
        if weights_step is not None:
            engine.stamp(weights_step)

    def ping(self) -> int | None:
        """The weights step that it may sample with; None where there is none."""
        return self.weights_step if self.released else None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        weights_step: int | None = None,
        for_s: float = math.inf,
    ) -> Turn:
        """Takes these requests up, samples for so long or until nothing is left, and gives the rollouts that ended.

        All requests are queued before the first step. Refuses where it does not hold the weights that are wanted.
        """
        if requests:
            self._check_may_sample(weights_step)
        for request in requests:
            assert request.rollout_id not in self._under_way, f"asked for {request.rollout_id} twice"
            self.engine.add(request.rollout_id, request.prompt_ids, request.sampling, request.seed)
            self._under_way[request.rollout_id] = request
        end = time.monotonic() + for_s
        while self._under_way:
            self._step()
            if time.monotonic() >= end:
                break
        if not self.released:
            return Turn([], len(self._under_way) + len(self._ended))
        ended, self._ended = self._ended, []
        return Turn(ended, len(self._under_way))

    def load_weights(self, parcel: Parcel) -> WeightsReceipt | None:
        """Loads a parcel of new weights, and with the last one hands back the proof of what has been received.

        From the first parcel on it holds no weights step and takes no requests; it may again after `release`.
        """
        if parcel.number == 0:
            self.released, self.weights_step = False, None
            self._loading_since = time.monotonic()
        sha256 = self.engine.load(parcel, self.name)
        if sha256 is None:
            return None
        self.engine.stamp(parcel.weights_step)
        self.weights_step = parcel.weights_step
        return WeightsReceipt(parcel.weights_step, sha256, time.monotonic() - self._loading_since)

    def probe(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]) -> list[Sampled]:
        """Responses that only serve to verify the weights; needs no release."""
        ids = [f"probe/{next(self._probe_numbers)}" for _ in prompts]
        for id, prompt, seed in zip(ids, prompts, seeds, strict=True):
            self.engine.add(id, prompt, sampling, seed)
        answers: dict[str, Sampled] = {}
        while len(answers) < len(ids):
            answers.update(self._step())
        return [answers[id] for id in ids]

    def release(self, weights_step: int) -> None:
        """Lets it sample: the hand-off has verified that it holds this step."""
        assert self.weights_step == weights_step, f"released step {weights_step}, holds {self.weights_step}"
        self.released = True

    def sleep(self) -> None:
        """Gives the engine's memory up; it holds no weights from here on."""
        assert not self._under_way, "asleep with rollouts under way"
        self.released, self.weights_step = False, None
        self.engine.sleep()

    def wake(self) -> None:
        """Ready for weights again."""
        self.engine.wake()

    def _check_may_sample(self, wanted: int | None) -> None:
        if not self.released or self.weights_step is None:
            raise InfrastructureError(
                f"{self.name} holds weights step {self.weights_step} unverified and must not sample; "
                "weights are handed over by WeightsHandoff.publish"
            )
        if wanted is not None and wanted != self.weights_step:
            raise InfrastructureError(f"{self.name} holds weights step {self.weights_step}, step {wanted} is wanted")

    def _step(self) -> dict[str, Sampled]:
        """One step of the engine: rollouts that ended are kept, answers to probes are returned."""
        if not self.engine.busy:
            raise InfrastructureError(f"{self.name}'s engine has nothing left to do, and answers are missing")
        probes = {}
        for id, answer in self.engine.step():
            self._check(answer)
            if request := self._under_way.pop(id, None):
                self._ended.append(_rollout(request, answer))
            else:
                probes[id] = answer
        return probes

    def _check(self, answer: Sampled) -> None:
        if not answer.ids or len(answer.ids) != len(answer.logprobs) or not all(map(math.isfinite, answer.logprobs)):
            raise InfrastructureError(
                f"{self.name} sampled {len(answer.ids)} tokens with log-probs {answer.logprobs[:8]}: "
                "each token needs a finite one"
            )


def _rollout(request: GenerationRequest, answer: Sampled) -> Rollout:
    first, *swaps = answer.spans
    return Rollout(
        id=request.rollout_id,
        prompt_id=request.prompt_id,
        prompt_ids=request.prompt_ids,
        response_ids=answer.ids,
        logprobs=answer.logprobs,
        weights_step=first.weights_step,
        finish_reason=answer.finish_reason,
        swaps=tuple(swaps),
    )
