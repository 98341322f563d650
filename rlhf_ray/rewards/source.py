"""What every source of rewards is."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_ray.types import Exchange


@dataclass(frozen=True, slots=True)
class Given:
    """What a source has to give for a batch."""

    rewards: Sequence[float | None]
    """One an exchange, in their order; None where there is none to be had."""
    spreads: Sequence[float] = ()
    """Standard deviation over an ensemble's members, one an exchange."""
    strange: Sequence[bool] = ()
    """Whether an exchange is unlike all that a reward model has learnt from, one an exchange; or nothing."""
    counts: Counter[str] = field(default_factory=Counter)
    """What went wrong on the way: `retries`, `timeouts`, `malformed`, ..."""


class Source(Protocol):
    """Gives rewards; built where the scorer runs."""

    def score(self, exchanges: Sequence[Exchange]) -> Given:
        """A reward for each exchange, in their order, or None."""


def as_reward(value: Any) -> float | None:
    """A finite number as it is; None for whatever is none: NaN, infinity, text, a truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
