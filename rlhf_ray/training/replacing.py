"""Prompts that make room for others within a step: those without a reward, and those that teach nothing.

A step always has its full size, and each of its rollouts a reward that a source has given. In dynamic sampling prompts
whose responses all earn the same are replaced, too: Yu et al. 2025 (DAPO, arXiv:2503.14476), section 3.2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import InfrastructureError
from rlhf_ray.types import Exchange, Prompt, Rollout

LEAST_SPREAD = 1e-6
"""Rewards of one prompt that lie closer than this count as equal."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Rollouts, what they say in text, and what that earned: three lists in one order, a prompt's together."""

    rollouts: list[Rollout]
    exchanges: list[Exchange]
    rewards: list[float | None]
    """None where no source had one to give."""

    @property
    def rewarded(self) -> bool:
        """Whether each of them has a reward."""
        return None not in self.rewards

    @property
    def earned(self) -> list[float]:
        """The rewards, each of which is there; `InfrastructureError` where one is not."""
        known = [reward for reward in self.rewards if reward is not None]
        if len(known) < len(self.rewards):
            raise InfrastructureError(
                f"{len(self.rewards) - len(known)} of {len(self.rewards)} answers have no reward; "
                "the same command resumes the run"
            )
        return known

    def by_prompt(self) -> "list[Answers]":
        """One for each prompt."""
        rows = zip(self.rollouts, self.exchanges, self.rewards, strict=True)
        groups = (list(group) for _, group in groupby(rows, key=lambda row: row[0].prompt_id))
        return [Answers(*map(list, zip(*group, strict=True))) for group in groups]

    @property
    def teaches(self) -> bool:
        """Whether the rewards differ."""
        return max(self.earned) - min(self.earned) > LEAST_SPREAD


class Replacing:
    """Replaces prompts of a step by spare ones; each of `spares` is one try, `ask` is what the policy makes of them."""

    def __init__(self, ask: Callable[[Sequence[Prompt]], Answers], spares: Iterable[Sequence[Prompt]]) -> None:
        self.ask, self.spares = ask, spares

    def unrewarded(self, first: Answers, *, why: Callable[[], str]) -> Answers:
        """The answers with prompts that lack a reward replaced by others that have all of theirs.

        Raises `InfrastructureError` where too few are found: no reward, no sample, and no smaller step in silence.
        `why` says what the sources' trouble was.
        """
        if first.rewarded:
            return first
        kept, missing = self._replace(first, lambda group: group.rewarded)
        wanted = len(first.by_prompt())
        if len(kept) < wanted:
            raise InfrastructureError(
                f"a step needs {wanted} prompts and only {len(kept)} have all their rewards, {len(missing)} have not "
                f"({why()}): see to the sources of rewards, then the same command resumes the run"
            )
        return joined(kept)

    def uniform(self, first: Answers) -> tuple[Answers, int]:
        """The answers with prompts that teach nothing replaced by spare ones that do, and how many were passed over.

        What is still missing after the last try is filled with what was passed over first.
        """
        wanted = len(first.by_prompt())
        kept, others = self._replace(first, lambda group: group.rewarded and group.teaches)
        dull = [group for group in others if group.rewarded]
        return joined([*kept, *dull][:wanted]), len(others) - max(0, wanted - len(kept))

    def _replace(self, first: Answers, keep: Callable[[Answers], bool]) -> tuple[list[Answers], list[Answers]]:
        groups = first.by_prompt()
        kept, others = _parted(groups, keep)
        for prompts in self.spares:
            if len(kept) == len(groups):
                break
            if not prompts:
                continue  # all that this try drew were in the step already
            more, worse = _parted(self.ask(prompts[: len(groups) - len(kept)]).by_prompt(), keep)
            kept, others = kept + more, others + worse
        return kept, others


def spare_prompts(
    stream: PromptStream, used: Iterable[Prompt], *, step: int, tries: int, n: int
) -> Iterator[list[Prompt]]:
    """Prompts that are not in the step yet, up to `n` a try: a function of the stream's seed and the step alone."""
    taken = {prompt.id for prompt in used}
    for number in range(tries):
        fresh = [prompt for prompt in stream.batch(step * tries + number, n) if prompt.id not in taken]
        taken |= {prompt.id for prompt in fresh}
        yield fresh


def joined(parts: Sequence[Answers]) -> Answers:
    """All of them in one."""
    return Answers(
        [rollout for part in parts for rollout in part.rollouts],
        [exchange for part in parts for exchange in part.exchanges],
        [reward for part in parts for reward in part.rewards],
    )


def _parted(groups: Iterable[Answers], keep: Callable[[Answers], bool]) -> tuple[list[Answers], list[Answers]]:
    kept: list[Answers] = []
    others: list[Answers] = []
    for group in groups:
        (kept if keep(group) else others).append(group)
    return kept, others
