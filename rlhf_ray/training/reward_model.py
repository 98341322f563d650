"""Reward models from people's feedback: fitted, measured on held-out choices, saved whole or not at all."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_ray.algo.ranking import accuracy_with_ci, confirmed_slope, expected_calibration_error, reliability_bins
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.preferences import Comparison, Rated, folds_by_group, split_by_group
from rlhf_ray.models.policy import prompt_text
from rlhf_ray.models.reward import RewardModel, new_reward_model
from rlhf_ray.training.fit import FitResult, fit
from rlhf_ray.training.reward_losses import RankingLoss, RatingLoss, marked, ranked
from rlhf_ray.types import Exchange

VALIDATION_SHARE = 0.1
"""Of the training prompts: they decide when to stop. What is held out only measures."""
STANDARDISED_ON = 1000
"""Training responses, at most, whose scores get mean 0 and standard deviation 1."""
LEAST_STD = 1e-3
"""Of the scores of a reward model whose choices nothing confirms."""

Items = Sequence[Comparison | Rated]
Say = Callable[[str], None]


def fit_reward_model(
    base: Path,
    train: Items,
    *,
    held_out: Items,
    config: RewardModelConfig,
    folder: Path | None,
    seed: int,
    progress: Say,
    stage: str = "reward_model",
    fits: Path | None = None,
) -> dict[str, Any]:
    """Trains a reward model on `train`, saves it into `folder` where one is given, and returns its metrics.

    A broken-off fit goes on from its checkpoints in `fits`.

    `base`: the base policy's folder, whose body or size it takes. Comparisons are learned with the ranking loss,
    ratings with MSE. Accuracy and calibration are those of `held_out`, which nothing else looks at. The saved model's
    scores have standard deviation 1 on the training responses, or less where choices that were not trained on confirm
    less (`standardise`), and mean 0 where its head has a bias to say so.
    """
    reward_model = new_reward_model(base, config.backbone, texts=_texts(train), seed=seed)
    learned = shuffled(train, seed=seed) if config.shuffle_labels else train
    inner, validation = _split(learned, seed=seed)
    say: dict[str, Any] = {"seed": seed, "stage": stage, "progress": progress, "folder": fits and fits / stage}
    result = _fit(reward_model, inner, validation, config=config, **say)
    standardised = standardise(reward_model, _some_exchanges(train, seed=seed), confirming=pairs_of(validation))
    metrics = {
        **measure(reward_model, pairs_of(held_out), logit_scale=standardised["logit_scale"]),
        **standardised,
        "backbone": config.backbone,
        "feedback": config.feedback,
        "shuffled_labels": config.shuffle_labels,
        "train_items": len(train),
        **asdict(result),
    }
    if folder is not None:
        reward_model.save(folder)
    return metrics


def cross_validate(
    base: Path, items: Items, *, config: RewardModelConfig, folds: int, seed: int, progress: Say
) -> dict[str, Any]:
    """Accuracy over all comparisons, each judged by a model that saw none of its group, beside the baselines.

    `accuracy_ci95` is narrower than one split's, for every pair is held out once; `folds` has each model's accuracy.
    """
    margins: list[float] = []
    judged: list[Comparison] = []
    accuracies = []
    splits = folds_by_group(items, group=lambda item: item.prompt.group, folds=folds, seed=seed)
    for number, (train, held_out) in enumerate(splits, 1):
        reward_model = new_reward_model(base, config.backbone, texts=_texts(train), seed=seed)
        learned = shuffled(train, seed=seed) if config.shuffle_labels else train
        say: dict[str, Any] = {"seed": seed, "stage": f"fold {number}/{folds}", "progress": progress}
        _fit(reward_model, *_split(learned, seed=seed), config=config, **say)
        pairs = pairs_of(held_out)
        margins += margins_of(reward_model, pairs)
        judged += pairs
        accuracies.append(_accuracy(margins[-len(pairs) :]))
    return {"folds": [accuracy["accuracy"] for accuracy in accuracies], **_accuracy(margins), **baselines(judged)}


def measure(reward_model: RewardModel, pairs: Sequence[Comparison], *, logit_scale: float = 1.0) -> dict[str, Any]:
    """How well a reward model predicts choices: accuracy, margin, calibration, and what the length alone predicts.

    A choice's predicted probability is sigmoid(logit_scale * margin).
    """
    margins = margins_of(reward_model, pairs)
    if not margins:
        return {"pairs": 0, "accuracy": None, "accuracy_ci95": None}
    probs = torch.sigmoid(logit_scale * torch.tensor(margins))
    right = torch.tensor([float(margin > 0) for margin in margins])
    confidence = torch.maximum(probs, 1 - probs)
    return {
        **_accuracy(margins),
        "margin": sum(margins) / len(margins),
        "ece": expected_calibration_error(confidence, right),
        "bins": [asdict(bar) for bar in reliability_bins(confidence, right)],
        **baselines(pairs),
    }


def baselines(pairs: Sequence[Comparison]) -> dict[str, Any]:
    """What always preferring the longer, or the shorter, answer would get right; of equal lengths, half."""
    longer = sum(len(pair.better) > len(pair.worse) for pair in pairs)
    shorter = sum(len(pair.better) < len(pair.worse) for pair in pairs)
    half = (len(pairs) - longer - shorter) // 2
    return {"longer": _share(longer + half, len(pairs)), "shorter": _share(shorter + half, len(pairs))}


def margins_of(reward_model: RewardModel, pairs: Sequence[Comparison]) -> list[float]:
    """The better answer's score less the worse one's; each distinct answer is scored once."""
    exchanges = list({Exchange(pair.prompt, text) for pair in pairs for text in (pair.better, pair.worse)})
    score = dict(zip(exchanges, reward_model.score(exchanges), strict=True))
    return [score[Exchange(pair.prompt, pair.better)] - score[Exchange(pair.prompt, pair.worse)] for pair in pairs]


def standardise(
    reward_model: RewardModel, exchanges: Sequence[Exchange], *, confirming: Sequence[Comparison]
) -> dict[str, Any]:
    """Gives the scores of `exchanges` a known standard deviation and, with a bias, mean 0, by changing the head.

    It is 1, so that a KL weight means the same for every reward model, but never more than twice the log-odds that
    `confirming` bears out: choices that the fit did not learn from. A model that learnt from noise says next to nothing
    then, instead of its noise as loud as a good model's word. `LEAST_STD` keeps the order of its scores.

    So the plain folder gives those scores to whoever loads it. A decoder's head has no bias, and its mean stays.
    `logit_scale` turns differences of the new scores into what the ranking loss saw.
    """
    scores = torch.tensor(reward_model.score(exchanges))
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    heads = [m for m in reward_model.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    assert len(heads) == 1, f"{len(heads)} layers with one output"
    slope = confirmed_slope(margins_of(reward_model, confirming), [pair.prompt.id for pair in confirming])
    confirmed = slope * std if confirming else None  # nobody to ask
    wanted = 1.0 if confirmed is None else min(1.0, max(2 * confirmed, LEAST_STD))
    scale = std / wanted if std > 1e-6 else 1.0  # scores that are all the same say nothing, however stretched
    bias = heads[0].bias
    with torch.no_grad():
        heads[0].weight.div_(scale)
        if bias is not None:
            bias.sub_(mean).div_(scale)
    return {
        "folded": "scale" if bias is None else "scale and shift",
        "logit_scale": scale,
        "score_mean": mean / scale if bias is None else 0.0,
        "score_std": std / scale,
        "confirmed_std": confirmed,
    }


def shuffled(items: Items, *, seed: int) -> Items:
    """The same items with labels that say nothing: each choice turned by a coin, ratings dealt out anew."""
    rng = random.Random(seed)
    ratings = [item.rating for item in items if isinstance(item, Rated)]
    rng.shuffle(ratings)
    deal = iter(ratings)
    return [
        replace(item, rating=next(deal))
        if isinstance(item, Rated)
        else (replace(item, better=item.worse, worse=item.better) if rng.random() < 0.5 else item)
        for item in items
    ]


def pairs_of(items: Items) -> list[Comparison]:
    """The comparisons among items; ratings compare those answers of a prompt that they tell apart."""
    pairs = [item for item in items if isinstance(item, Comparison)]
    by_prompt: dict[str, list[Rated]] = {}
    for item in items:
        if isinstance(item, Rated):
            by_prompt.setdefault(item.prompt.id, []).append(item)
    return pairs + [
        Comparison(better.prompt, better.response, worse.response)
        for answers in by_prompt.values()
        for better, worse in permutations(answers, 2)
        if better.rating > worse.rating and better.response != worse.response
    ]


def _split(items: Items, *, seed: int) -> tuple[Items, Items]:
    """What a fit learns from, and what tells it when to stop."""
    groups = len({item.prompt.group for item in items})
    share = max(1, round(VALIDATION_SHARE * groups))
    return split_by_group(items, group=lambda item: item.prompt.group, held_out=share, seed=seed)


def _fit(
    reward_model: RewardModel, train: Items, validation: Items, *, config: RewardModelConfig, **say: Any
) -> FitResult:
    if config.feedback == "ratings":
        inner, outer = marked(reward_model, train, like=train), marked(reward_model, validation, like=train)
        return fit(reward_model.model, RatingLoss(reward_model), inner, validation=outer, config=config.fit, **say)
    prompts = ranked(reward_model, train)
    answers = sum(len(prompt.texts) for prompt in prompts) / max(len(prompts), 1)
    a_step = config.fit.model_copy(update={"batch_size": max(1, round(config.fit.batch_size / max(answers, 1)))})
    loss = RankingLoss(reward_model)
    return fit(reward_model.model, loss, prompts, validation=ranked(reward_model, validation), config=a_step, **say)


def _exchanges(items: Items) -> list[Exchange]:
    """Every prompt with every answer, once, in a fixed order."""
    answers = [
        Exchange(item.prompt, text)
        for item in items
        for text in ((item.response,) if isinstance(item, Rated) else (item.better, item.worse))
    ]
    return list(dict.fromkeys(answers))


def _some_exchanges(items: Items, *, seed: int) -> list[Exchange]:
    exchanges = _exchanges(items)
    return random.Random(seed).sample(exchanges, min(STANDARDISED_ON, len(exchanges)))


def _texts(items: Items) -> list[str]:
    return [f"{prompt_text(exchange.prompt.messages)}\n{exchange.response}" for exchange in _exchanges(items)]


def _accuracy(margins: Sequence[float]) -> dict[str, Any]:
    return {"pairs": len(margins), **_share(sum(margin > 0 for margin in margins), len(margins))}


def _share(correct: int, n: int) -> dict[str, Any]:
    accuracy, low, high = accuracy_with_ci(correct, n)
    return {"accuracy": accuracy, "accuracy_ci95": [low, high]}
