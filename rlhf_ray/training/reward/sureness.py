"""Last layers that might as well have been learnt, and the place of what was learnt from."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Judgement
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.models.sureness import Sureness
from rlhf_ray.training.reward.linear import Line
from rlhf_ray.training.reward.objective import Judged, judged, judgements_of

MOST = 4_000
"""Prompts that the heads learn from."""
STEPS = 200
"""Of L-BFGS: what is left after them is far less than what the draws differ in."""
KEPT = 0.999
"""Share of the features' variance within which distances are told; the rest is noise."""
EXCEEDED = 0.99
"""Quantile of distances beyond which a text is strange."""


def learn_sureness(
    reward_model: RewardModel,
    train: Sequence[Judgement],
    validation: Sequence[Judgement],
    *,
    config: RewardModelConfig,
    seed: int,
) -> Sureness:
    """Of a reward model whose head is one and has its final scale.

    Each of `config.ensemble.heads` last layers learns from the same prompts, each of which counts for what was drawn
    for it (the Bayesian bootstrap: Rubin 1981; Newton and Raftery 1994), and is brought to the scale of the model's own
    on these texts. What is strange is told by `validation`, whose texts taught nothing.
    """
    draw = torch.Generator().manual_seed(seed)
    items = judged(reward_model, train, config)
    if len(items) > MOST:
        items = [items[place] for place in torch.randperm(len(items), generator=draw)[:MOST].tolist()]
    features = _features(reward_model, items)
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    rows = (features - mean) / std
    own = rows @ (reward_model.head.weight.detach()[0].cpu().double() * std)
    line, heads = Line(rows.shape[1], config), []
    by_aspect = torch.tensor(list(config.aspects.values()), dtype=torch.float64)
    for _ in range(config.ensemble.heads):
        weights = torch.empty(len(items), dtype=torch.float64).exponential_(generator=draw).tolist()
        batch = judgements_of(
            [_weighed(item, weight) for item, weight in zip(items, weights, strict=True)], dtype=torch.float64
        )
        weight = by_aspect @ line.parts(line.descend(rows, batch, steps=STEPS))[0]
        scale = own.std() / (rows @ weight).std().clamp(min=1e-9)
        heads.append(weight * scale / std)
    whiten = _whiten(features - mean)
    seen = _features(reward_model, judged(reward_model, validation, config))
    sure = Sureness(
        torch.stack(heads).float() if heads else torch.zeros(0, rows.shape[1]),
        mean.float(),
        whiten.float(),
        torch.inf * torch.ones(()),
    )
    return replace(sure, limit=sure.distance(seen.float()).quantile(EXCEEDED))


def _features(reward_model: RewardModel, items: Sequence[Judged]) -> Tensor:
    """(B, H) of every text, in the items' order."""
    return reward_model.features([text for item in items for text in item.texts]).double()


def _weighed(item: Judged, by: float) -> Judged:
    return Judged(
        item.texts,
        [(*pair[:4], pair[4] * by) for pair in item.pairs],
        [(rows, ranks, weight * by) for rows, ranks, weight in item.rankings],
        [(*rating[:3], rating[3] * by) for rating in item.ratings],
        [(*thumb[:2], thumb[2] * by) for thumb in item.thumbs],
    )


def _whiten(centred: Tensor) -> Tensor:
    """(H, R) for features about their mean."""
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    share = values.clamp(min=0).flip(0).cumsum(0) / values.clamp(min=0).sum().clamp(min=1e-12)
    kept = min(int((share < KEPT).sum()) + 1, len(values))
    scaled: Tensor = vectors[:, -kept:] / values[-kept:].clamp(min=1e-12).sqrt()
    return scaled
