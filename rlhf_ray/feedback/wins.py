"""Who wins by what people said: each sampler's answers against each other one's, to the same prompts."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from rlhf_ray.algo.ranking import bootstrap_mean_ci
from rlhf_ray.feedback.schema import Answer, Feedback

Verdict = tuple[str, str, str, float]
"""Prompt, two names in their order, and the first one's share: 1 won, 0.5 a tie, 0 lost."""


@dataclass(frozen=True, slots=True)
class Duel:
    """One sampler against another."""

    name: str
    other: str
    judgements: int
    prompts: int
    rate: float
    """Mean over prompts of the share of judgements that prefer `name`; ties count half."""
    ci95: tuple[float, float]
    """By bootstrap over prompts."""


def wins(feedback: Iterable[Feedback], *, seed: int = 0) -> list[Duel]:
    """Every two samplers whose answers to one prompt somebody compared: in a ranking, or by rating both.

    Ratings compare where one annotator gave both, on one scale and in one aspect. Answers of a published policy count
    for its version.
    """
    shares: defaultdict[tuple[str, str], defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prompt, name, other, share in _verdicts(feedback):
        shares[name, other][prompt].append(share)
    duels = []
    for (name, other), by_prompt in sorted(shares.items()):
        means = [sum(said) / len(said) for said in by_prompt.values()]
        judgements = sum(map(len, by_prompt.values()))
        interval = bootstrap_mean_ci(means, seed=seed)
        duels.append(Duel(name, other, judgements, len(means), sum(means) / len(means), interval))
    return duels


def name_of(answer: Answer) -> str:
    """The sampler, with the published version where the answer has one: `policy@3`."""
    return answer.sampler if answer.policy_version is None else f"{answer.sampler}@{answer.policy_version}"


def _verdicts(feedback: Iterable[Feedback]) -> Iterator[Verdict]:
    rated: defaultdict[tuple[str, str, str, str], list[tuple[str, float]]] = defaultdict(list)
    for item in feedback:
        if item.ranking:
            places = zip(item.answers, item.ranking.ranks, strict=True)
            yield from _compared(item.prompt_id, [(name_of(answer), -float(rank)) for answer, rank in places])
        elif item.rating:
            same = (item.prompt_id, item.annotator, item.rating.scale, item.rating.aspect)
            rated[same].append((name_of(item.answers[0]), item.rating.value))
    for (prompt, *_), marks in rated.items():
        yield from _compared(prompt, marks)


def _compared(prompt: str, marks: list[tuple[str, float]]) -> Iterator[Verdict]:
    for (name, mark), (other, less) in combinations(sorted(marks), 2):
        if name != other:
            yield prompt, name, other, 0.5 if mark == less else float(mark > less)
