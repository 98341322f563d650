"""How sure a reward model may be: what other last layers would say, and how far a text is from all it has learnt from.

Both are read off what the body says of a text, in the same pass that scores it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "sureness.safetensors"
"""Beside the model's own files, which load without it."""


@dataclass(frozen=True, slots=True)
class Considered:
    """Rewards, and what is known of how sure they are; nothing where the model cannot say."""

    rewards: list[float]
    spreads: list[float]
    """Standard deviation over members or heads that might as well have been learnt."""
    strange: list[bool]
    """Whether a text is unlike what was learnt from."""
    mean: float = 0.0
    """Reward of what was learnt from, in the mean: all rewards are known up to a constant, which this tells."""


def agreed(considered: Sequence[Considered]) -> Considered:
    """The members' mean, with their standard deviation for its spread; strange is what is so to any of them.

    Each member's rewards have a constant of their own, its mean, which is no doubt: the spread is that of what they say
    beyond it. A single member's is that over its heads.
    """
    if len(considered) == 1:
        return considered[0]
    means = [one.mean for one in considered]
    rows = list(zip(*(one.rewards for one in considered), strict=True))
    return Considered(
        [statistics.fmean(row) for row in rows],
        [statistics.pstdev(map(float.__sub__, row, means)) for row in rows],
        [any(flags) for flags in zip(*(one.strange for one in considered if one.strange), strict=True)],
        statistics.fmean(means),
    )


@dataclass(frozen=True, slots=True)
class Sureness:
    """An ensemble of last layers, and where the body's features lie on what was learnt from. H features, K heads."""

    heads: Tensor
    """(K, H) weights; a head's constant would say nothing. K may be 0."""
    middle: Tensor
    """(H) the features' mean."""
    whiten: Tensor
    """(H, R) what makes their differences from it uncorrelated, with variance 1."""
    limit: Tensor
    """() the distance that one in a hundred texts of the same kind exceeds."""

    def opinions(self, features: Tensor) -> Tensor:
        """(B, K) the reward by each head of features (B, H), less what it says of their mean.

        A reward is known up to a constant; that of each head is set by the texts that were learnt from.
        """
        opinions: Tensor = (features - self.middle) @ self.heads.T
        return opinions

    def spread(self, features: Tensor) -> Tensor:
        """(B) standard deviation of the opinions, of which two at least are needed: one has none, and no certainty."""
        assert len(self.heads) > 1, len(self.heads)
        return self.opinions(features).std(1, correction=0)

    def strange(self, features: Tensor) -> Tensor:
        """(B) bool: farther from what was learnt from than it should be, by the distance of Mahalanobis 1936.

        On features, as Lee et al. 2018 (arXiv:1807.03888) flag what is out of distribution, with one class.
        """
        beyond: Tensor = self.distance(features) > self.limit
        return beyond

    def distance(self, features: Tensor) -> Tensor:
        """(B) in standard deviations of the features."""
        apart: Tensor = ((features - self.middle) @ self.whiten).norm(dim=1)
        return apart

    def save(self, folder: Path) -> None:
        """Adds it to a saved reward model."""
        save_file(
            {
                "heads": self.heads.float().contiguous(),
                "middle": self.middle.float(),
                "whiten": self.whiten.float().contiguous(),
                "limit": self.limit.float(),
            },
            folder / FILE,
        )


def load_sureness(folder: Path) -> Sureness | None:
    """What `save` left there; None in a folder that says nothing of it."""
    if not (folder / FILE).is_file():
        return None
    return Sureness(**load_file(folder / FILE))
