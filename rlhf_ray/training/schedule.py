"""When a fit takes large steps and small ones, and in which order it sees its data."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Sampler

CHUNK = 16
"""Batches among which like lengths are put together: enough to save padding, few enough to stay random."""
WARM_UP = 0.05
"""Steps of the rise to the full rate, as a share of all; at most 100."""


@dataclass
class Pace:
    """The learning rate's factor at each step: up in a line, constant, and from `tail_start` down in a line."""

    end: int
    """The step to stop at."""
    eval_every: int
    tail: float
    """Steps of the decay to zero, as a share of those before it."""
    scheduled: bool = False
    """Whether Trainer has a schedule of its own; then there is no tail, and what remains is when to stop."""
    tail_start: int = field(init=False)
    """Where there is a look at the validation loss before it, one of these, so that the best weights are known."""
    warm_up: int = field(init=False)

    def __post_init__(self) -> None:
        self.warm_up = max(1, min(100, round(WARM_UP * self.end)))
        at_most = self.end / (1 + self.tail)
        self.tail_start = math.floor(at_most / self.eval_every) * self.eval_every or max(1, round(at_most))

        if self.scheduled:
            self.tail_start = self.end

    def turn_flat(self, step: int) -> None:
        """The loss is flat: the decay starts now rather than as late as possible, or all ends where there is none."""
        if self.scheduled:
            self.end = step
        elif step < self.tail_start:
            self.tail_start = step
            self.end = min(self.end, step + max(1, round(self.tail * step)))

    def factor(self, step: int) -> float:
        """Of the configured rate, for the update after `step` ones."""
        left = (self.end - step) / max(self.end - self.tail_start, 1)
        return min(1.0, (step + 1) / self.warm_up, max(left, 0.0))


class LengthGrouped(Sampler[int]):
    """A fresh random order each epoch in which each batch of `size` holds like lengths."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self._lengths, self._size, self._seed = lengths, size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer says which epoch begins: after a resume it is not the first."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        whole_batches = len(self._lengths) // self._size
        random = torch.Generator().manual_seed(self._seed)
        for _ in range(self._epoch):  # what the epochs before this one drew
            torch.randperm(len(self._lengths), generator=random)
            torch.randperm(whole_batches, generator=random)
        order = torch.randperm(len(self._lengths), generator=random).tolist()
        chunk = self._size * CHUNK
        order = [
            index
            for start in range(0, len(order), chunk)
            for index in sorted(order[start : start + chunk], key=lambda i: self._lengths[i])
        ]
        batches = [order[start : start + self._size] for start in range(0, len(order), self._size)]
        for place in torch.randperm(whole_batches, generator=random).tolist():
            yield from batches[place]
        if len(batches) > whole_batches:  # last, for the loader cuts the stream every `size` items
            yield from batches[-1]
