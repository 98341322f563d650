"""Dynamic sampling: prompts whose responses all earn the same teach nothing, and make room for others.

Yu et al. 2025 (DAPO, arXiv:2503.14476), section 3.2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.types import Exchange, Prompt, Rollout

LEAST_SPREAD = 1e-6
"""Rewards of one prompt that lie closer than this count as equal."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Rollouts, what they say in text, and what that earned: three lists in one order, a prompt's together."""

    rollouts: list[Rollout]
    exchanges: list[Exchange]
    rewards: list[float]

    def by_prompt(self) -> "list[Answers]":
        """One for each prompt."""
        rows = zip(self.rollouts, self.exchanges, self.rewards, strict=True)
        groups = (list(group) for _, group in groupby(rows, key=lambda row: row[0].prompt_id))
        return [Answers(*map(list, zip(*group, strict=True))) for group in groups]

    @property
    def teaches(self) -> bool:
        """Whether the rewards differ."""
        return max(self.rewards) - min(self.rewards) > LEAST_SPREAD


def replace_uniform(
    first: Answers, *, ask: Callable[[Sequence[Prompt]], Answers], spares: Iterable[Sequence[Prompt]]
) -> tuple[Answers, int]:
    """The answers with prompts that teach nothing replaced by spare ones that do, and how many were passed over.

    Each of `spares` is one try; what is still missing after the last is filled with what was passed over first, for a
    step always has its full size.
    """
    groups = first.by_prompt()
    wanted = len(groups)
    kept, uniform = _parted(groups)
    for prompts in spares:
        if len(kept) == wanted:
            break
        if not prompts:
            continue  # all that this try drew were in the step already
        more, dull = _parted(ask(prompts[: wanted - len(kept)]).by_prompt())
        kept, uniform = kept + more, uniform + dull
    passed_over = len(uniform) - max(0, wanted - len(kept))
    return joined([*kept, *uniform][:wanted]), passed_over


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


def _parted(groups: Iterable[Answers]) -> tuple[list[Answers], list[Answers]]:
    kept: list[Answers] = []
    uniform: list[Answers] = []
    for group in groups:
        (kept if group.teaches else uniform).append(group)
    return kept, uniform
