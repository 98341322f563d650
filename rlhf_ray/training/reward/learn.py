"""Reward models from people's feedback: fitted, measured on held-out choices, saved whole or not at all."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algo.ranking import confirmed_slope
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import (
    Comparison,
    Judgement,
    Ordered,
    Rated,
    Thumbed,
    comparisons,
    counted,
    exchanges_of,
    of_kinds,
)
from rlhf_ray.data.splits import split_by_group
from rlhf_ray.models.lora import with_adapter, with_adapter_merged
from rlhf_ray.models.policy import prompt_text
from rlhf_ray.models.reward import MEMBERS, RewardModel, new_reward_model
from rlhf_ray.roles.ranks import rank_and_count
from rlhf_ray.training.fit import FitResult, fit
from rlhf_ray.training.reward.linear import fit_linear
from rlhf_ray.training.reward.measure import (
    Together,
    by_kind,
    how_sure,
    margins_of,
    measure,
    order_of_ratings,
    ratings_among,
    told_by,
)
from rlhf_ray.training.reward.objective import FeedbackLoss, RewardNetwork, judged, kinds_of
from rlhf_ray.training.reward.sureness import learn_sureness
from rlhf_ray.types import Exchange

VALIDATION_SHARE = 0.1
"""Of the training prompts: they decide when to stop. What is held out only measures."""
STANDARDISED_ON = 1000
"""Training responses, at most, whose scores get mean 0 and standard deviation 1."""
APART = 1_000_003
"""Between the seeds of an ensemble's members."""
LEAST_STD = 1e-3
"""Of the scores of a reward model whose choices nothing confirms."""

Judgements = Sequence[Judgement]
Say = Callable[[str], None]


def fit_reward_model(
    base: Path,
    train: Judgements,
    *,
    held_out: Judgements,
    config: RewardModelConfig,
    folder: Path | None,
    seed: int,
    progress: Say,
    stage: str = "reward_model",
    fits: Path | None = None,
) -> dict[str, Any]:
    """Trains a reward model on `train`, saves it into `folder` where one is given, and returns its metrics.

    A broken-off fit goes on from its checkpoints in `fits`. Of several ranks, which all call it, the first returns and
    saves.

    `base`: the base policy's folder, whose body or size it takes. Of `train` it learns from the kinds that the config
    names. Accuracy and calibration are those of `held_out`, which nothing else looks at. The saved model's scores have
    standard deviation 1 on the training responses, or less where choices that were not trained on confirm less
    (`standardise`), and mean 0 where its head has a bias to say so.
    """

    def member(number: int) -> tuple[RewardModel, FitResult, dict[str, Any]]:
        name = stage if number == 0 else f"{stage}_{number}"
        say: dict[str, Any] = {"stage": name, "progress": progress, "folder": fits and fits / name}
        return learn(base, train, config=config, seed=seed + APART * number, **say)

    reward_model, result, told = member(0)
    members = [reward_model, *(member(number)[0] for number in range(1, config.ensemble.members))]
    if rank_and_count()[0] > 0:
        return {}  # the first one says and saves it all
    learnable = _learnable(train, config, seed=seed)
    reward_model.sureness = learn_sureness(reward_model, *_split(learnable, seed=seed), config=config, seed=seed)
    if folder is not None:
        for path, saved in zip(
            [folder, *(folder / MEMBERS / f"{n}" for n in range(1, len(members)))], members, strict=True
        ):
            saved.save(path)
    together = Together(members)
    ratings, pairs = ratings_among(held_out), comparisons(held_out)
    return {
        **measure(together, told_by(held_out, config.feedback), logit_scale=told["logit_scale"]),
        "by_kind": by_kind(margins_of(together, pairs), pairs),
        "ratings": order_of_ratings(together.score([item.exchanges[0] for item in ratings]), ratings),
        "sureness": how_sure(together, pairs),
        **told,
        "backbone": config.backbone,
        "feedback": config.feedback,
        "shuffled_labels": config.shuffle_labels,
        "train_items": counted(learnable),
        **asdict(result),
    }


def learn(
    base: Path, train: Judgements, *, config: RewardModelConfig, seed: int, **say: Any
) -> tuple[RewardModel, FitResult, dict[str, Any]]:
    """A reward model with one head and scores of known scale, how its fit went, and what `standardise` says."""
    learnable = _learnable(train, config, seed=seed)
    body = "decoder" if config.backbone == "linear" else config.backbone
    reward_model = new_reward_model(
        base, body, body=config.body, heads=len(config.aspects), texts=_texts(learnable), seed=seed
    )
    inner, validation = _split(learnable, seed=seed)
    result = _fit(reward_model, inner, validation, config=config, seed=seed, **say)
    reward_model.fold_heads(list(config.aspects.values()))
    confirming = comparisons(validation)
    if not confirming:  # ratings of one answer each compare nothing; others may have been compared
        groups = {item.prompt.group for item in validation}
        confirming = comparisons(item for item in train if item.prompt.group in groups)
    return reward_model, result, standardise(reward_model, _some(learnable, seed=seed), confirming=confirming)


def standardise(
    reward_model: RewardModel, exchanges: Sequence[Exchange], *, confirming: Sequence[Comparison]
) -> dict[str, Any]:
    """Gives the scores of `exchanges` a known standard deviation and, with a bias, mean 0, by changing the head.

    It is 1, so that a KL weight means the same for every reward model, but never more than twice the log-odds that
    `confirming` bears out: choices that the fit did not learn from. A model that learnt from noise says next to nothing
    then, instead of its noise as loud as a good model's word. `LEAST_STD` keeps the order of its scores.

    So the plain folder gives those scores to whoever loads it. A decoder's head has no bias, and its mean stays.
    `logit_scale` turns differences of the new scores into what the ranking loss saw; `temperature` is what those
    log-odds have to be divided by to be as sure as `confirming` bears out (Guo et al. 2017, arXiv:1706.04599).
    """
    scores = torch.tensor(reward_model.score(exchanges))
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    slope = confirmed_slope(margins_of(reward_model, confirming), [pair.prompt.id for pair in confirming])
    confirmed = slope * std if confirming else None  # nobody to ask
    wanted = 1.0 if confirmed is None else min(1.0, max(2 * confirmed, LEAST_STD))
    scale = std / wanted if std > 1e-6 else 1.0  # scores that are all the same say nothing, however stretched
    head = reward_model.head
    with torch.no_grad():
        head.weight.div_(scale)
        if head.bias is not None:
            head.bias.sub_(mean).div_(scale)
    return {
        "folded": "scale" if head.bias is None else "scale and shift",
        "logit_scale": scale,
        "score_mean": mean / scale if head.bias is None else 0.0,
        "score_std": std / scale,
        "confirmed_std": confirmed,
        "temperature": 1 / slope if slope > 0 else None,
    }


def shuffled(items: Judgements, *, seed: int) -> list[Judgement]:
    """The same items with labels that say nothing: each order turned by a coin, ratings and thumbs dealt out anew."""
    rng = random.Random(seed)
    ratings = [item.target for item in items if isinstance(item, Rated)]
    thumbs = [item.up for item in items if isinstance(item, Thumbed)]
    rng.shuffle(ratings)
    rng.shuffle(thumbs)
    rate, hold = iter(ratings), iter(thumbs)
    dealt: list[Judgement] = []
    for item in items:
        if isinstance(item, Rated):
            dealt.append(replace(item, target=next(rate)))
        elif isinstance(item, Thumbed):
            dealt.append(replace(item, up=next(hold)))
        else:
            dealt.append(_turned(item) if rng.random() < 0.5 else item)
    return dealt


def _learnable(train: Judgements, config: RewardModelConfig, *, seed: int) -> Judgements:
    """What the config learns from, with the labels that it gives them."""
    learnable = of_kinds(train, kinds_of(config.feedback))
    return shuffled(learnable, seed=seed) if config.shuffle_labels else learnable


def _turned(item: Ordered) -> Ordered:
    """The worst first; ties stay ties."""
    below = [sum(other > rank for other in item.ranks) for rank in item.ranks]
    return replace(item, ranks=tuple(1 + n for n in below))


def _split(items: Judgements, *, seed: int) -> tuple[Judgements, Judgements]:
    """What a fit learns from, and what tells it when to stop."""
    groups = len({item.prompt.group for item in items})
    share = max(1, round(VALIDATION_SHARE * groups))
    return split_by_group(items, group=lambda item: item.prompt.group, held_out=share, seed=seed)


def _fit(
    reward_model: RewardModel,
    train: Judgements,
    validation: Judgements,
    *,
    config: RewardModelConfig,
    seed: int,
    **say: Any,
) -> FitResult:
    inner, outer = (judged(reward_model, items, config) for items in (train, validation))
    if config.backbone == "linear":
        return fit_linear(reward_model, inner, validation=outer, config=config)
    answers = sum(len(prompt.texts) for prompt in inner) / max(len(inner), 1)
    _, ranks = rank_and_count()
    prompts = ranks * max(1, round(config.fit.batch_size / max(answers, 1) / ranks))
    a_step = config.fit.model_copy(update={"batch_size": prompts})
    adapted = with_adapter(reward_model.model, config.lora, use="reward_model", seed=seed)
    network = RewardNetwork(adapted, config)
    result = fit(network, FeedbackLoss(reward_model), inner, validation=outer, config=a_step, seed=seed, **say)
    if config.lora.rank:
        reward_model.model = with_adapter_merged(adapted)
    return result


def _some(items: Judgements, *, seed: int) -> list[Exchange]:
    exchanges = exchanges_of(items)
    return random.Random(seed).sample(exchanges, min(STANDARDISED_ON, len(exchanges)))


def _texts(items: Judgements) -> list[str]:
    return [f"{prompt_text(exchange.prompt.messages)}\n{exchange.response}" for exchange in exchanges_of(items)]
