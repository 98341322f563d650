"""The reward-model stage: a frozen snapshot in, a reward model and `reward_model.json` out."""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.data.preferences import Comparison, Rated, comparisons, rated, split_by_group
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Feedback
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.recipes.annotators import TIE
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.reward_model import cross_validate, fit_reward_model, measure, pairs_of


def make_reward_model(
    config: Config,
    base: Path,
    folder: Path,
    *,
    store: str,
    snapshot: str,
    half: int | None = None,
    fits: Path | None = None,
) -> dict[str, Any]:
    """Trains on a snapshot of the store, saves into `folder`, and returns `reward_model.json`'s content.

    `half`, 0 or 1: of the annotators, whose feedback alone is learnt from (`halves`).
    Where the recipe knows the true order of answers, accuracy is measured against it on the held-out pairs, and the
    accuracy on what the annotators said stands beside it; otherwise what people said is all there is.
    """
    wanted = config.reward_model
    items = learnable(config, store=store, snapshot=snapshot, half=half)
    train, held_out = split_by_group(
        items, group=lambda item: item.prompt.group, held_out=wanted.held_out, seed=config.seed
    )
    if not pairs_of(held_out):
        raise DataError(
            f"none of {len(held_out)} held-out {wanted.feedback} compare two answers; raise reward_model.held_out"
        )
    if wanted.limit is not None and half != 1:  # the judge learns from all of its half
        train = random.Random(f"limit/{config.seed}").sample(train, min(wanted.limit, len(train)))
    print(f"reward model: {len(train)} {wanted.feedback} to learn from, {len(held_out)} held out")
    with tempfile.TemporaryDirectory() as scratch:
        trained = Path(scratch) / "reward_model"
        on_choices = fit_reward_model(
            base,
            train,
            held_out=held_out,
            config=wanted,
            folder=trained,
            seed=config.seed,
            progress=print,
            stage="judge" if half == 1 else "reward_model",
            fits=fits,
        )
        measured = on_choices
        true_order = truly_ordered(held_out, make_recipe(config))
        if true_order:
            measured = measure(load_reward_model(trained), true_order, logit_scale=on_choices["logit_scale"])
        load_reward_model(trained).save(folder)
    if on_choices["confirmed_std"] is not None and on_choices["score_std"] < 0.99:
        print(
            f"reward model: choices that it did not learn from confirm log-odds of {on_choices['confirmed_std']:.2f} a "
            f"standard deviation, so its scores vary by {on_choices['score_std']:.3f} and not by 1"
        )
    return {
        **_record(on_choices, measured, against="the true order" if true_order else "what people chose"),
        "n_train": len(train),
        "half": half,
        "shuffled_labels": wanted.shuffle_labels,
    }


def make_cross_validation(config: Config, base: Path, *, store: str, snapshot: str) -> dict[str, Any]:
    """`reward_model.json`'s `cross_validation`: reward models of all folds judged on what each has not seen."""
    validated = cross_validate(
        base,
        learnable(config, store=store, snapshot=snapshot),
        config=config.reward_model,
        folds=config.reward_model.cross_validation,
        seed=config.seed,
        progress=print,
    )
    return {
        "folds": len(validated["folds"]),
        "by_fold": validated["folds"],
        **{name: validated[name] for name in ("accuracy", "accuracy_ci95", "pairs")},
        **{name: validated[name]["accuracy"] for name in ("longer", "shorter")},
    }


def learnable(config: Config, *, store: str, snapshot: str, half: int | None = None) -> list[Comparison | Rated]:
    """What a snapshot holds of the kind of feedback that the config learns from; `DataError` where that is nothing."""
    wanted = config.reward_model.feedback
    with FeedbackStore(store, read_only=True) as opened:
        judged = list(opened.read(snapshot))
    if half is not None:
        judged = halves(judged)[half]
    items: list[Comparison | Rated] = [*(comparisons(judged) if wanted == "pairs" else rated(judged))]
    if not items:
        raise DataError(f"snapshot {snapshot} holds no {wanted} to learn from; set reward_model.feedback")
    return items


def _record(on_choices: dict[str, Any], measured: dict[str, Any], *, against: str) -> dict[str, Any]:
    """What a fit and a measurement came to, as `reward_model.json` has it."""
    return {
        "accuracy": measured["accuracy"],
        "accuracy_ci95": measured["accuracy_ci95"],
        "against": against,
        "on_choices": {name: on_choices[name] for name in ("accuracy", "accuracy_ci95")},
        "margin": measured["margin"],
        "logit_scale": on_choices["logit_scale"],
        "score_std": on_choices["score_std"],
        "confirmed_std": on_choices["confirmed_std"],
        "calibration": {
            "ece": measured["ece"],
            "bins": [
                {
                    "lo": b["low"],
                    "hi": b["high"],
                    "n": b["count"],
                    "predicted": b["predicted"],
                    "observed": b["observed"],
                }
                for b in measured["bins"]
            ],
        },
        "curve": on_choices["curve"],
        "flat": on_choices["flat"],
        "seconds": on_choices["seconds"],
        "baselines": {name: measured[name]["accuracy"] for name in ("longer", "shorter")},
        "cross_validation": None,
        "n_held_out": measured["pairs"],
    }


def halves(feedback: Sequence[Feedback]) -> tuple[list[Feedback], list[Feedback]]:
    """The feedback of every second annotator, by name, and that of the others; `DataError` where there is one only."""
    annotators = sorted({item.annotator for item in feedback})
    if len(annotators) < 2:
        raise DataError("reward_model.judge needs feedback of two annotators or more: leave it out")
    first = set(annotators[::2])
    return [item for item in feedback if item.annotator in first], [
        item for item in feedback if item.annotator not in first
    ]


def truly_ordered(items: Sequence[Comparison | Rated], recipe: Recipe) -> list[Comparison]:
    """The held-out comparisons turned as the gold score orders them; none where it is unknown or the two are equal."""
    turned = []
    for item in items:
        if not isinstance(item, Comparison):
            continue
        better, worse = (recipe.gold(item.prompt, text) for text in (item.better, item.worse))
        if better is None or worse is None or abs(better - worse) < TIE:
            continue
        turned.append(item if better > worse else Comparison(item.prompt, item.worse, item.better))
    return turned
