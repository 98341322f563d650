"""Which prompts a step samples, and with which seeds: functions of the step, so that a resumed run asks the same."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence

from rlhf_ray.errors import DataError
from rlhf_ray.types import Prompt


class PromptStream:
    """Prompts in an endless order, shuffled anew each epoch.

    It holds no position: `batch` is a pure function of the seed, the step and the batch size. An epoch ends with its
    last whole batch, so no prompt comes twice within an epoch, nor within a batch; those left over change each epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int | str) -> None:
        assert len({prompt.id for prompt in prompts}) == len(prompts), "prompts of one stream need distinct ids"
        self._prompts = tuple(prompts)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._prompts)

    def in_another_order(self) -> "PromptStream":
        """The same prompts, shuffled otherwise: to draw from besides."""
        return PromptStream(self._prompts, seed=f"{self._seed}/spare")

    def batch(self, step: int, n: int) -> list[Prompt]:
        """The `n` prompts of a step, counted from 0."""
        assert step >= 0, step
        assert n > 0, n
        if n > len(self._prompts):
            raise DataError(
                f"{n} prompts a step are more than the {len(self._prompts)} there are to train on: "
                "lower rollout.prompts or give more data"
            )
        epoch, place = divmod(step, len(self._prompts) // n)
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return [self._prompts[index] for index in order[place * n : (place + 1) * n]]


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, by id, in the order of first appearance."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.id, prompt)
    return list(first.values())


def rollout_seed(run_id: str, step: int | str, prompt_id: str, sample: int) -> int:
    """The seed of one rollout, 31 bits of a hash of its identity: a redone rollout draws the same numbers."""
    identity = json.dumps([run_id, step, prompt_id, sample])
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") & 0x7FFFFFFF
