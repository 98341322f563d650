"""Cross-validation: every judgement held out once, for intervals as small as the data allow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Comparison, Rated, comparisons
from rlhf_ray.data.reading import Reader, of_aspects
from rlhf_ray.data.splits import folds_by_group
from rlhf_ray.feedback.schema import Feedback
from rlhf_ray.training.reward.learn import Say, learn, learnable_of
from rlhf_ray.training.reward.measure import by_kind, judged_by, margins_of, order_of_ratings, ratings_among, told_by

FOLD = "fold_"
"""What the folder of a fold's fit begins with."""


def cross_validate(
    base: Path,
    feedback: Sequence[Feedback],
    *,
    config: RewardModelConfig,
    folds: int,
    seed: int,
    progress: Say,
    fits: Path | None = None,
) -> dict[str, Any]:
    """Accuracy over all comparisons, each judged by a single model that saw none of its group, beside the baselines.

    `accuracy_ci95` is narrower than one split's, for every pair is held out once; it is that of the mean over the
    folds' models of how right each is on what it has not seen, for which the folds' errors are as good as independent
    (Bayle et al. 2020, arXiv:2007.12671). `by_fold` has each model's accuracy, None where its fold compares nothing;
    `ratings` the same of rated answers, with length as a score beside the model's. Broken off, it goes on from `fits`.
    """
    margins: list[float] = []
    pairs: list[Comparison] = []
    all_margins: list[float] = []
    all_pairs: list[Comparison] = []
    rated: list[Rated] = []
    scores: list[float] = []
    by_fold: list[float | None] = []
    kept = of_aspects(feedback, config.aspects)
    splits = folds_by_group(kept, group=lambda item: item.group, folds=folds, seed=seed)
    for number, (train, held_out) in enumerate(splits, 1):
        reader = Reader(train, weigh=config.reliability, margin=config.margin)
        comments = config.feedback == "comments"
        reward_model, *_ = learn(
            base,
            learnable_of(reader.read(train, all_comments=comments), config, seed=seed),
            config=config,
            seed=seed,
            stage=f"fold {number}/{folds}",
            progress=progress,
            folder=fits and fits / f"{FOLD}{number}",
        )
        seen = reader.read(held_out, all_comments=comments)
        mine, every = told_by(seen, config), comparisons(seen)
        found = margins_of(reward_model, mine)
        by_fold.append(judged_by(found, mine)["accuracy"])
        margins, pairs = margins + found, pairs + mine
        all_margins, all_pairs = all_margins + margins_of(reward_model, every), all_pairs + every
        ratings = ratings_among(seen)
        scores += reward_model.score([item.exchanges[0] for item in ratings])
        rated += ratings
    return {
        "folds": folds,
        "by_fold": by_fold,
        **judged_by(margins, pairs),
        "by_kind": by_kind(all_margins, all_pairs),
        "ratings": order_of_ratings(scores, rated),
        "ratings_by_length": {
            "shorter answer": order_of_ratings([-float(len(item.response)) for item in rated], rated),
            "shorter prompt": order_of_ratings(
                [-float(len(item.prompt.messages[-1].content)) for item in rated], rated
            ),
        },
    }
