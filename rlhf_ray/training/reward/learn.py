"""Reward models from people's feedback: fitted, measured on held-out choices, saved whole or not at all."""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import (
    Judgement,
    Judgements,
    Ordered,
    Rated,
    Thumbed,
    comparisons,
    counted,
    exchanges_of,
    matched,
)
from rlhf_ray.data.splits import folds_by_group, split_by_group
from rlhf_ray.models.ensemble import Ensemble
from rlhf_ray.models.files import MEMBERS
from rlhf_ray.models.lora import with_adapter, with_adapter_merged
from rlhf_ray.models.policy import prompt_text
from rlhf_ray.models.reward import RewardModel, new_reward_model
from rlhf_ray.roles.ranks import rank_and_count
from rlhf_ray.training.fit import FitResult, fit
from rlhf_ray.training.reward.linear import fit_linear
from rlhf_ray.training.reward.measure import (
    by_kind,
    how_sure,
    margins_of,
    measure,
    order_of_ratings,
    order_of_thumbs,
    ratings_among,
    thumbs_among,
    told_by,
)
from rlhf_ray.training.reward.objective import FeedbackLoss, RewardNetwork, judged, learnable
from rlhf_ray.training.reward.scale import Unseen, standardise
from rlhf_ray.training.reward.sureness import learn_sureness
from rlhf_ray.types import Exchange

VALIDATION_SHARE = 0.1
"""Of the training prompts: they decide when to stop. What is held out only measures."""
STANDARDISED_ON = 1000
"""Training responses, at most, whose scores get mean 0 and standard deviation 1."""
APART = 1_000_003
"""Between the seeds of an ensemble's members."""
PARTS = 10
"""Of the training prompts; each in turn may be left out of a fit, even of what ends it, that is then asked about it."""
LEAST_GROUPS = 3
"""Of prompts: one part is left out, one ends the fit, one teaches."""

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
    standard deviation 1 on the training responses, or less where judgements that were not trained on confirm less
    (`Unseen`, `standardise`), and mean 0 where its head has a bias to say so. Those judgements are the ones that end
    the fit, or, where they are on fewer than `config.confirmed_by` prompts, those of parts that models like it are
    fitted without.
    """

    def fitted(name: str, items: Judgements, seed: int) -> Learnt:
        say: dict[str, Any] = {"stage": name, "progress": progress, "folder": fits and fits / name}
        return learn(base, items, config=config, seed=seed, **say)

    taught = learnable_of(train, config, seed=seed)
    learnt = [
        fitted(f"{stage}_{number}" if number else stage, taught, seed + APART * number)
        for number in range(config.ensemble.members)
    ]
    some = _some(taught, seed=seed)
    unseen = Unseen()
    unseen.ask(learnt[0].reward_model, learnt[0].validation, said=train, exchanges=some)
    if len(unseen.best.prompts) < config.confirmed_by and any(
        pairs(items) for pairs in (comparisons, matched) for items in (taught, train)
    ):
        others = Unseen()
        for number, (rest, part) in enumerate(_parts(taught, seed=seed)):
            without = fitted(f"{stage}_without_{number}", rest, seed).reward_model
            others.ask(without, part, said=train, exchanges=_some(rest, seed=seed))
            if len(others.best.prompts) >= config.confirmed_by:
                break
        unseen = others if others.best.margins else unseen
    if rank_and_count()[0] > 0:
        return {}  # the first one says and saves it all
    members = [each.reward_model for each in learnt]
    told, *_ = [standardise(each, some, unseen=unseen, least_std=config.least_std) for each in members]
    members[0].sureness = learn_sureness(members[0], *_split(taught, seed=seed), config=config, seed=seed)
    if folder is not None:
        for path, saved in zip(
            [folder, *(folder / MEMBERS / f"{n}" for n in range(1, len(members)))], members, strict=True
        ):
            saved.save(path)
    return {
        **_worth(
            Ensemble(members),
            held_out,
            config=config,
            logit_scale=told["logit_scale"],
            temperature=told["temperature"],
        ),
        **told,
        "backbone": config.backbone,
        "feedback": config.feedback,
        "shuffled_labels": config.shuffle_labels,
        "train_items": counted(taught),
        **asdict(learnt[0].result),
    }


def _worth(
    ensemble: Ensemble,
    held_out: Judgements,
    *,
    config: RewardModelConfig,
    logit_scale: float,
    temperature: float | None,
) -> dict[str, Any]:
    """What it makes of judgements that nothing has looked at before."""
    ratings, thumbs, pairs = ratings_among(held_out), thumbs_among(held_out), comparisons(held_out)
    return {
        **measure(ensemble, told_by(held_out, config), logit_scale=logit_scale, temperature=temperature),
        "by_kind": by_kind(margins_of(ensemble, pairs), pairs),
        "ratings": order_of_ratings(ensemble.score([item.exchanges[0] for item in ratings]), ratings),
        "thumbs": order_of_thumbs(ensemble.score([item.exchanges[0] for item in thumbs]), thumbs),
        "sureness": how_sure(ensemble, pairs),
    }


class Learnt(NamedTuple):
    """A reward model as its fit leaves it."""

    reward_model: RewardModel
    """With one head; of scores in no known unit."""
    result: FitResult
    validation: Judgements
    """What told the fit when to stop."""


def learn(base: Path, taught: Judgements, *, config: RewardModelConfig, seed: int, **say: Any) -> Learnt:
    """Fits a reward model to what `learnable_of` gave; its heads become one.

    `say`: what `fit` calls it, says of it, and saves on its way.
    """
    body = "decoder" if config.backbone == "linear" else config.backbone
    reward_model = new_reward_model(
        base, body, body=config.body, heads=len(config.aspects), texts=_texts(taught), seed=seed
    )
    inner, validation = _split(taught, seed=seed)
    result = _fit(reward_model, inner, validation, config=config, seed=seed, **say)
    reward_model.fold_heads(list(config.aspects.values()))
    return Learnt(reward_model, result, validation)


def learnable_of(train: Judgements, config: RewardModelConfig, *, seed: int) -> Judgements:
    """What the config learns from, with the labels that it gives them."""
    told = learnable(train, config)
    return shuffled(told, seed=seed) if config.shuffle_labels else told


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


def _parts(items: Judgements, *, seed: int) -> Iterator[tuple[Judgements, Judgements]]:
    """All but one part, and that part, for each; nothing where there is too little left to fit without one.

    Whoever takes so many parts that they hold N prompts, or all, fits no more than about 8 N prompts.
    """
    groups = len({item.prompt.group for item in items})
    if groups >= LEAST_GROUPS:
        yield from folds_by_group(items, group=lambda item: item.prompt.group, folds=min(PARTS, groups), seed=seed)


def _turned(item: Ordered) -> Ordered:
    """The worst first; ties stay ties."""
    below = [sum(other > rank for other in item.ranks) for rank in item.ranks]
    return replace(item, ranks=tuple(1 + n for n in below))


def _split(items: Judgements, *, seed: int) -> tuple[Judgements, Judgements]:
    """What a fit learns from, and what tells it when to stop."""
    return split_by_group(items, group=lambda item: item.prompt.group, held_out=VALIDATION_SHARE, seed=seed)


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
    shares = rank_and_count()[1] * int(config.fit.trainer.get("gradient_accumulation_steps", 1))
    prompts = shares * max(1, round(config.fit.batch_size / max(answers, 1) / shares))
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
