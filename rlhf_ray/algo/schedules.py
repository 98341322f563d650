"""How a learning rate goes over a run."""

import math
from typing import Literal, assert_never

Schedule = Literal["constant", "linear", "cosine"]


def rate_factor(step: int, *, steps: int, warmup: int, schedule: Schedule) -> float:
    """Of the configured rate, for the step after `step` ones of `steps`.

    It rises in a line over the first `warmup` steps. Then it stays, or falls so that a step after the last would have
    0: in a line, 1 - s / n, or on a half cosine, (1 + cos(pi s / n)) / 2 (Loshchilov and Hutter 2017,
    arXiv:1608.03983, equation 5 without restarts), with s and n counted from the end of the rise.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2
        case _:
            assert_never(schedule)
