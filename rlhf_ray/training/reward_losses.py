"""What a reward model learns from: all comparisons of a prompt at once, or ratings one by one."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.algo.ranking import pairwise_loss
from rlhf_ray.data.preferences import Comparison, Rated
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.training.fit import Batch
from rlhf_ray.types import Exchange


@dataclass(frozen=True, slots=True)
class Ranked:
    """All comparisons of one prompt, each of its answers there once."""

    texts: tuple[tuple[int, ...], ...]
    """Token ids of prompt and answer."""
    pairs: tuple[tuple[int, int], ...]
    """Which text was preferred to which."""


@dataclass(frozen=True, slots=True)
class Marked:
    """An answer with its rating, standardised over the training ratings."""

    text: tuple[int, ...]
    target: float


class RankingLoss:
    """Bradley-Terry over all pairs of a prompt, each answer scored once: k answers cost k passes, not k(k-1).

    Ouyang et al. 2022 (arXiv:2203.02155), equation 1 and the text around it, which
    also finds that it overfits less.
    """

    def __init__(self, reward_model: RewardModel) -> None:
        self._collate = reward_model.collate

    def length(self, item: Ranked) -> int:
        """Tokens of its answers, once padded."""
        return len(item.texts) * max(map(len, item.texts))

    def collate(self, items: Sequence[Ranked]) -> Batch:
        """The answers' rows, and `pairs` (N, 2) of rows."""
        pairs: list[tuple[int, int]] = []
        rows: list[Sequence[int]] = []
        for item in items:
            pairs += [(len(rows) + better, len(rows) + worse) for better, worse in item.pairs]
            rows += item.texts
        return {**self._collate(rows), "pairs": torch.tensor(pairs)}

    def terms(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["pairs"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Nats summed over the pairs."""
        scores = _scores(model, batch)
        better, worse = batch["pairs"].T
        return pairwise_loss(scores[better], scores[worse]) * len(better)


class RatingLoss:
    """Squared distance of the score to the standardised rating."""

    def __init__(self, reward_model: RewardModel) -> None:
        self._collate = reward_model.collate

    def length(self, item: Marked) -> int:
        """Tokens of the answer with its prompt."""
        return len(item.text)

    def collate(self, items: Sequence[Marked]) -> Batch:
        """The answers' rows, and `targets` (B)."""
        return {
            **self._collate([item.text for item in items]),
            "targets": torch.tensor([item.target for item in items]),
        }

    def terms(self, batch: Batch) -> int:
        """Answers."""
        return len(batch["targets"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Squared errors summed over the answers."""
        return (_scores(model, batch) - batch["targets"]).square().sum()


def ranked(reward_model: RewardModel, items: Sequence[Comparison | Rated]) -> list[Ranked]:
    """The comparisons among items, put together by prompt, in the reward model's tokens."""
    prompts: dict[str, tuple[dict[Exchange, int], list[tuple[int, int]]]] = {}
    for item in items:
        if isinstance(item, Comparison):
            rows, pairs = prompts.setdefault(item.prompt.id, ({}, []))
            better, worse = Exchange(item.prompt, item.better), Exchange(item.prompt, item.worse)
            pairs.append((rows.setdefault(better, len(rows)), rows.setdefault(worse, len(rows))))
    encoded = iter(reward_model.encode([exchange for rows, _ in prompts.values() for exchange in rows]))
    return [Ranked(tuple(tuple(next(encoded)) for _ in rows), tuple(pairs)) for rows, pairs in prompts.values()]


def marked(
    reward_model: RewardModel, items: Sequence[Comparison | Rated], *, like: Sequence[Comparison | Rated]
) -> list[Marked]:
    """The ratings among items in the reward model's tokens, standardised as the ratings of `like` are."""
    ratings = [item.rating for item in like if isinstance(item, Rated)]
    mean, std = (statistics.fmean(ratings), statistics.pstdev(ratings) or 1.0) if ratings else (0.0, 1.0)
    rated = [item for item in items if isinstance(item, Rated)]
    encoded = reward_model.encode([Exchange(item.prompt, item.response) for item in rated])
    return [Marked(tuple(ids), (item.rating - mean) / std) for ids, item in zip(encoded, rated, strict=True)]


def _scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, 1)
    return logits[:, 0]
