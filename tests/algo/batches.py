"""Random batches as the arithmetic meets them: ragged, padded on either side with anything, some rows empty."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

parity = settings(deadline=None, max_examples=200)
seeds = st.integers(0, 2**31 - 1)


@dataclass(frozen=True)
class Ragged:
    """Which entries of a (B, T) tensor count, and numbers for them."""

    mask: Tensor
    seed: int

    def draw(self, n: int, fill: float = 0.0) -> Iterator[Tensor]:
        """n tensors (B, T) in float64, `fill` where nothing counts."""
        generator = torch.Generator().manual_seed(self.seed)
        for tensor in torch.randn(n, *self.mask.shape, generator=generator, dtype=torch.float64):
            yield tensor.masked_fill(~self.mask, fill)

    def rows(self, *tensors: Tensor) -> Iterator[tuple[list[float], ...]]:
        """Each row's entries that count, as plain lists; empty rows too."""
        for row, inside in enumerate(self.mask):
            yield tuple(tensor[row][inside].tolist() for tensor in tensors)


@st.composite
def ragged(draw: st.DrawFn, *, shortest: int = 0) -> Ragged:
    lengths = draw(st.lists(st.integers(shortest, 6), min_size=2, max_size=6).filter(any))
    width = max(lengths) + draw(st.integers(0, 2))
    places = torch.arange(width)
    right = places < torch.tensor(lengths).unsqueeze(1)
    return Ragged(right if draw(st.booleans()) else right.flip(1), draw(seeds))


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Returns (B) and their groups (B), two or more to a group, in any order."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    groups = [7 * number for number, size in enumerate(sizes) for _ in range(size)]
    order = draw(st.permutations(groups))
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.randn(len(order), generator=generator, dtype=torch.float64), torch.tensor(order)
