"""What a reward model learns from: everything that was said of a prompt's answers, in one likelihood.

Each answer is read once, however many judgements there are of it: k answers cost k passes, not k(k-1) (Ouyang et al.
2022, arXiv:2203.02155, section 3.5, which also finds that it overfits less).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.algo.batching import pad
from rlhf_ray.algo.feedback_losses import pair_losses, ranking_losses, rating_losses, thumb_losses
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Judgement, Kind, Ordered, Rated, Thumbed
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.training.fit import Batch
from rlhf_ray.types import Exchange

RATING_NOISE = 0.5
"""Share of a standardised rating's variance that is taken for noise. Learnt, it would have no bottom: a network that
knows its training ratings by heart would have them outweigh all else.
"""
HASTE = 10.0
"""The links learn so much faster than the weights, of which small steps change much."""


@dataclass(frozen=True, slots=True)
class Judged:
    """All that was said of one prompt's answers, each of which is there once; places are indices into `texts`."""

    texts: tuple[tuple[int, ...], ...]
    """Token ids of prompt and answer."""
    pairs: list[tuple[int, int, bool, float, float]] = field(default_factory=list)
    """Better, worse, whether it is a tie and they only stand so, margin, weight."""
    rankings: list[tuple[tuple[int, ...], tuple[int, ...], float]] = field(default_factory=list)
    """Answers, their ranks, weight."""
    ratings: list[tuple[int, int, float, float]] = field(default_factory=list)
    """Answer, number of the aspect, target, weight."""
    thumbs: list[tuple[int, float, float]] = field(default_factory=list)
    """Answer, 1 for up, weight."""


class RewardNetwork(nn.Module):
    """A sequence classifier with a head for each aspect, and how each kind of feedback hangs on what it says.

    The reward is the heads' sum by weight, in log-odds. A rating of an aspect is normal about a line through that
    aspect's head, a thumb is up with the odds of the reward over a threshold, a tie as likely as `tie` has it: these
    links are learnt with the model and thrown away after it.
    """

    def __init__(self, model: PreTrainedModel, config: RewardModelConfig) -> None:
        """With ratings alone the line is the head itself, which is plain MSE: its scale is the reward's."""
        super().__init__()
        self.model = model
        self._config = config
        aspects, free = len(config.aspects), config.feedback == "joint"
        self.links = nn.ParameterDict(
            {
                "tie": nn.Parameter(torch.zeros(())),
                "threshold": nn.Parameter(torch.zeros(())),
                "offset": nn.Parameter(torch.zeros(aspects)),
                "log_slope": nn.Parameter(torch.zeros(aspects), requires_grad=free),
            }
        )

    @property
    def config(self) -> Any:
        """The model's own."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.links.parameters()).device

    def forward(self, batch: Batch) -> Tensor:
        """Nats summed over the judgements, each by its weight."""
        logits: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        links = {name: HASTE * parameter for name, parameter in self.links.items()}
        return nats(logits.float(), batch, links, self._config)


def nats(heads: Tensor, batch: Batch, links: Mapping[str, Tensor], config: RewardModelConfig) -> Tensor:
    """What `RewardNetwork` says of a batch, from heads (B, A) that are known and links."""
    scores = heads @ torch.tensor(list(config.aspects.values()), dtype=heads.dtype, device=heads.device)  # (B)
    better, worse = batch["pairs"].T
    pairs = pair_losses(
        scores[better],
        scores[worse],
        tied=batch["pair_tied"],
        margin=batch["pair_margin"],
        smoothing=config.smoothing,
        ties=config.ties,
        tie=links["tie"],
    )
    rankings = ranking_losses(scores[batch["rankings"]], batch["ranks"])
    row, aspect = batch["ratings"].T
    expected = links["offset"][aspect] + links["log_slope"].exp()[aspect] * heads[row, aspect]
    ratings = rating_losses(expected, batch["targets"]) / RATING_NOISE
    thumbs = thumb_losses(scores[batch["thumbs"]] - links["threshold"], batch["up"], smoothing=config.smoothing)
    total = (
        (pairs * batch["pair_weight"]).sum()
        + (rankings * batch["ranking_weight"]).sum()
        + (ratings * batch["rating_weight"]).sum()
        + (thumbs * batch["thumb_weight"]).sum()
    )
    if config.centring:
        means = torch.zeros_like(batch["prompt_terms"]).index_add(0, batch["prompts"], scores)
        means = means / batch["prompts"].bincount(minlength=len(means))
        total = total + config.centring * (means.square() * batch["prompt_terms"]).sum()
    return total


class FeedbackLoss:
    """Batches of what was said of prompts' answers, for `RewardNetwork`."""

    def __init__(self, reward_model: RewardModel) -> None:
        self._collate = reward_model.collate

    def length(self, item: Judged) -> int:
        """Tokens of its answers, once padded."""
        return len(item.texts) * max(map(len, item.texts))

    def collate(self, items: Sequence[Judged]) -> Batch:
        """The answers' rows, `judgements_of` them."""
        return {**self._collate([text for item in items for text in item.texts]), **judgements_of(items)}

    def terms(self, batch: Batch) -> float:
        """What all judgements weigh together."""
        return float(batch["prompt_terms"].sum())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Nats summed over the judgements, each by its weight."""
        loss: Tensor = model(batch)
        return loss


def judgements_of(items: Sequence[Judged], *, dtype: torch.dtype = torch.float32) -> Batch:
    """What was said of the answers, of which there is a row each, in the items' order.

    `pairs` (N, 2), `rankings` and `ranks` (M, longest), `ratings` (R, 2) of row and aspect, `thumbs` (T), with their
    weights; `prompts` (B) the item of each row, `prompt_terms` (items) what its judgements weigh.
    """
    starts = [0]
    for item in items:
        starts.append(starts[-1] + len(item.texts))
    numbered = list(zip(starts, items, strict=False))
    pairs = [(start + i, start + j, *rest) for start, item in numbered for i, j, *rest in item.pairs]
    rankings = [
        ([start + row for row in rows], ranks, weight)
        for start, item in numbered
        for rows, ranks, weight in item.rankings
    ]
    ratings = [(start + row, *rest) for start, item in numbered for row, *rest in item.ratings]
    thumbs = [(start + row, *rest) for start, item in numbered for row, *rest in item.thumbs]

    def numbers(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return {
        "pairs": torch.tensor([pair[:2] for pair in pairs], dtype=torch.long).reshape(-1, 2),
        "pair_tied": torch.tensor([bool(pair[2]) for pair in pairs], dtype=torch.bool),
        "pair_margin": numbers([pair[3] for pair in pairs]),
        "pair_weight": numbers([pair[4] for pair in pairs]),
        "rankings": _padded([rows for rows, _, _ in rankings]),
        "ranks": _padded([ranks for _, ranks, _ in rankings]),
        "ranking_weight": numbers([weight for _, _, weight in rankings]),
        "ratings": torch.tensor([rating[:2] for rating in ratings], dtype=torch.long).reshape(-1, 2),
        "targets": numbers([rating[2] for rating in ratings]),
        "rating_weight": numbers([rating[3] for rating in ratings]),
        "thumbs": torch.tensor([thumb[0] for thumb in thumbs], dtype=torch.long),
        "up": numbers([thumb[1] for thumb in thumbs]),
        "thumb_weight": numbers([thumb[2] for thumb in thumbs]),
        "prompts": torch.tensor([number for number, item in enumerate(items) for _ in item.texts], dtype=torch.long),
        "prompt_terms": numbers([_weight_of(item) for item in items]),
    }


def judged(reward_model: RewardModel, items: Sequence[Judgement], config: RewardModelConfig) -> list[Judged]:
    """What is `learnable` of the judgements, put together by prompt, in the reward model's tokens."""
    aspects = {name: number for number, name in enumerate(config.aspects)}
    rows: dict[str, dict[Exchange, int]] = {}
    found: dict[str, Judged] = {}
    for item in learnable(items, config):
        weight = _weight(item, config)
        here = rows.setdefault(item.prompt.id, {})
        places = tuple(here.setdefault(exchange, len(here)) for exchange in item.exchanges)
        said = found.setdefault(item.prompt.id, Judged(()))
        if isinstance(item, Rated):
            said.ratings.append((places[0], aspects.get(item.aspect, 0), item.target, weight))
        elif isinstance(item, Thumbed):
            said.thumbs.append((places[0], float(item.up), weight))
        elif _as_a_whole(item, config):
            said.rankings.append((places, item.ranks, weight))
        else:
            said.pairs.extend(_pairs(item, places, weight, ties=config.ties != "none"))
    encoded = iter(reward_model.encode([exchange for prompt in found for exchange in rows[prompt]]))
    return [
        Judged(tuple(tuple(next(encoded)) for _ in rows[prompt]), said.pairs, said.rankings, said.ratings, said.thumbs)
        for prompt, said in found.items()
    ]


def learnable(items: Iterable[Judgement], config: RewardModelConfig) -> list[Judgement]:
    """Those that teach a reward model something: of kinds and aspects that the config learns from, and that weigh
    anything there; of an order that is not learnt from as a whole, something has to be better, or ties have to count.
    """
    return [item for item in items if item.kind in kinds_of(config.feedback) and _teaches(item, config)]


def _teaches(item: Judgement, config: RewardModelConfig) -> bool:
    if _weight(item, config) == 0:
        return False
    if isinstance(item, Ordered):
        return _as_a_whole(item, config) or config.ties != "none" or len(set(item.ranks)) > 1
    return not isinstance(item, Rated) or item.kind == "comments" or item.aspect in config.aspects


def _as_a_whole(item: Ordered, config: RewardModelConfig) -> bool:
    return config.feedback == "rankings" or (config.feedback == "joint" and item.kind == "rankings")


def _weight(item: Judgement, config: RewardModelConfig) -> float:
    return item.weight * (getattr(config.weights, item.kind) if config.feedback == "joint" else 1.0)


def kinds_of(feedback: str) -> tuple[Kind, ...]:
    """Which kinds of judgements a setting of `reward_model.feedback` learns from."""
    match feedback:
        case "pairs" | "rankings":
            return ("pairs", "rankings")
        case "joint":
            return ("pairs", "rankings", "ratings", "thumbs", "comments")
        case "ratings" | "thumbs" | "comments":
            return (feedback,)
    raise AssertionError(feedback)


def _pairs(
    item: Ordered, places: Sequence[int], weight: float, *, ties: bool
) -> list[tuple[int, int, bool, float, float]]:
    told = [(places[i], places[j], False, item.margin, weight) for i, j in item.preferences]
    if ties:
        told += [
            (places[i], places[j], True, 0.0, weight)
            for i, j in combinations(range(len(places)), 2)
            if item.ranks[i] == item.ranks[j]
        ]
    return told


def _weight_of(item: Judged) -> float:
    return math.fsum(said[-1] for kind in (item.pairs, item.rankings, item.ratings, item.thumbs) for said in kind)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(N, longest), 0 behind the shorter ones."""
    return pad(rows, value=0, dtype=torch.long) if rows else torch.zeros(0, 1, dtype=torch.long)
