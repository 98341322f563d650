"""Feedback as a reward model reads it: pairs and ratings, split so that nothing held out was trained on."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Feedback, Scale
from rlhf_ray.types import Prompt

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Somebody preferred one answer to another."""

    prompt: Prompt
    better: str
    worse: str


@dataclass(frozen=True, slots=True)
class Rated:
    """Somebody gave an answer a number."""

    prompt: Prompt
    response: str
    rating: float


def comparisons(feedback: Iterable[Feedback]) -> list[Comparison]:
    """Every strict preference in every ranking."""
    return [Comparison(item.prompt, better.text, worse.text) for item in feedback for better, worse in item.preferences]


def rated(feedback: Iterable[Feedback], *, scale: Scale = "stars", aspect: str = "overall") -> list[Rated]:
    """The ratings on one scale and in one aspect; others do not mix with them."""
    return [
        Rated(item.prompt, item.answers[0].text, item.rating.value)
        for item in feedback
        if item.rating and item.rating.scale == scale and item.rating.aspect == aspect
    ]


def split_by_group(
    items: Sequence[Item], *, group: Callable[[Item], str], held_out: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Items to train on and items held out; no group has items in both.

    `held_out` is a share of the groups (a float below 1) or a number of them (an int). Which groups are held out
    depends on their names and the seed, not on the order of the items.
    """
    groups = _shuffled({group(item) for item in items}, seed)
    wanted = round(held_out * len(groups)) if isinstance(held_out, float) else held_out
    if not 0 < wanted < len(groups):
        raise DataError(
            f"cannot hold out {held_out} of {len(groups)} distinct prompt groups ({len(items)} rows): at least one has "
            "to be held out and one left to train on; give more data or change held_out"
        )
    return _divide(items, group, set(groups[:wanted]))


def folds_by_group(
    items: Sequence[Item], *, group: Callable[[Item], str], folds: int, seed: int
) -> Iterator[tuple[list[Item], list[Item]]]:
    """For cross-validation: `folds` splits whose held-out sides are disjoint and together hold every item."""
    groups = _shuffled({group(item) for item in items}, seed)
    if not 2 <= folds <= len(groups):
        raise DataError(
            f"cannot make {folds} folds of {len(groups)} distinct prompt groups ({len(items)} rows): "
            "folds have to lie between 2 and the number of groups; give more data or change the folds"
        )
    return (_divide(items, group, set(groups[fold::folds])) for fold in range(folds))


def _divide(items: Sequence[Item], group: Callable[[Item], str], held_out: set[str]) -> tuple[list[Item], list[Item]]:
    train = [item for item in items if group(item) not in held_out]
    return train, [item for item in items if group(item) in held_out]


def _shuffled(groups: set[str], seed: int) -> list[str]:
    return sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
