"""Splits by group: nothing that is held out shares its group with anything that was trained on."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rlhf_ray.errors import DataError

Item = TypeVar("Item")


def split_by_group(
    items: Sequence[Item], *, group: Callable[[Item], str], held_out: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Items to train on and items held out; no group has items in both.

    `held_out` is a share of the groups, one at least (a float below 1), or a number of them (an int). Which groups are
    held out depends on their names and the seed, not on the order of the items.
    """
    groups = _shuffled({group(item) for item in items}, seed)
    wanted = max(1, round(held_out * len(groups))) if isinstance(held_out, float) else held_out
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
