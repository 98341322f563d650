"""Sequences of different lengths as rectangles, and the order in which they are learned from."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PADDING, LEAST = 1.08, 256
"""Of a learner's passes: `by_length`'s bounds, measured in docs/log.md."""


def pad(sequences: Sequence[Sequence[float]], *, value: float, dtype: torch.dtype) -> Tensor:
    """The sequences as rows of one tensor, (B, longest), filled up on the right with `value`.

    No sequence gives (0, 0); only empty ones give (B, 0).
    """
    longest = max(map(len, sequences), default=0)
    padded = torch.full((len(sequences), longest), value, dtype=dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence, dtype=dtype)
    return padded


def minibatches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The numbers 0 to n - 1 in random order, `size` at a time, (size) int64; the last one may be smaller.

    One pass is one epoch: each number comes once. The order depends on the generator's state alone.
    """
    assert size > 0, size
    order = torch.randperm(n, generator=generator)
    for start in range(0, n, size):
        yield order[start : start + size]


def dealt_by_length(lengths: Sequence[int], *, max_tokens: int, hands: int) -> list[list[list[int]]]:
    """`by_length`'s batches dealt out to so many hands, as many to each; where they do not go round, empty ones.

    There are at least as many batches as hands where there are as many sequences, for none should only look on.
    """
    fair = max_tokens if hands == 1 else min(max_tokens, max(1, -(-sum(lengths) // hands)))
    batches = by_length(lengths, max_tokens=fair, padding=PADDING, least=LEAST)
    batches += [[] for _ in range(-len(batches) % hands)]
    return [batches[hand::hands] for hand in range(hands)]


def dealt_by_weight(lengths: Sequence[int], *, max_tokens: int, hands: int) -> list[list[list[int]]]:
    """As few batches as hold at most `max_tokens` each, padding not counted, as many to each hand and about as heavy.

    For batches without padding. The longest sequence left goes to the lightest batch (Graham 1969, LPT); one longer
    than `max_tokens` makes a batch of its own. Indices within a batch are in order.
    """
    each = max(1, -(-sum(lengths) // (max_tokens * hands)))
    while True:
        batches: list[list[int]] = [[] for _ in range(each * hands)]
        weights = [0] * len(batches)
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            lightest = weights.index(min(weights))
            batches[lightest].append(index)
            weights[lightest] += lengths[index]
        if all(weight <= max_tokens or len(batch) == 1 for weight, batch in zip(weights, batches, strict=True)):
            return [[sorted(batch) for batch in batches[hand::hands]] for hand in range(hands)]
        each += 1


def by_length(
    lengths: Sequence[int], *, max_tokens: int, padding: float | None = None, least: int = 0
) -> list[list[int]]:
    """Batches of indices, longest sequences first, each at most `max_tokens` large once padded.

    A batch costs (number of sequences) * (its longest), so like lengths lie together and little is padding. With
    `padding` a batch also ends where its padded tokens would be more than so many times the real ones, unless it holds
    less than `least` of them: a pass over few tokens costs as much as one over more. A sequence longer than
    `max_tokens` makes a batch of its own. Equal lengths keep their order.
    """
    batches: list[list[int]] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        wasteful = padding is not None and real >= least and padded > padding * (real + lengths[index])
        if batches and padded <= max_tokens and not wasteful:
            batches[-1].append(index)
        else:
            batches.append([index])
            real = 0
        real += lengths[index]
    return batches
