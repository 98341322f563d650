"""The reward-model stage: a frozen snapshot in, a reward model and `reward_model.json` out."""

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config, RewardModelConfig
from rlhf_ray.data.judgements import Comparison, Judgement, Ordered, counted, exchanges_of, taken_apart
from rlhf_ray.data.reading import Reader, of_aspects
from rlhf_ray.data.splits import folds_by_group, split_by_group
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Feedback
from rlhf_ray.models.ensemble import load_ensemble
from rlhf_ray.recipes.annotators import TIE
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.roles.ranks import rank_and_count
from rlhf_ray.training.frozen import read_frozen
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.reward.card import write_card
from rlhf_ray.training.reward.learn import fit_reward_model
from rlhf_ray.training.reward.measure import measure, told_by
from rlhf_ray.training.reward.objective import kinds_of, learnable
from rlhf_ray.training.reward.validate import cross_validate

QUIET = 0.01
"""Standard deviation of scores below which PPO's KL weight outweighs them."""


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
    Where the recipe knows the true order of answers, accuracy is measured against it on the held-out answers, and the
    accuracy on what the annotators said stands beside it; otherwise what people said is all there is.
    """
    wanted = config.reward_model
    first = rank_and_count()[0] == 0
    say = print if first else _nothing
    feedback = read_frozen(store, snapshot, config=config, say=say)
    train, held_out, reader = read_sides(feedback, config, half=half)
    if others := len(feedback) - len(of_aspects(feedback, wanted.aspects)):
        say(f"reward model: {others} ratings of other aspects than {', '.join(wanted.aspects)} are left out")
    said = ", ".join(f"{n} {kind}" for kind, n in counted(learnable(train, wanted)).items())
    judging = len(told_by(held_out, wanted))
    say(f"reward model: {said} to learn from; {judging} choices between two answers held out")
    ignored = sorted(name for name, person in reader.reliability.items() if person.choices == person.ratings == 0)
    if ignored:
        say(f"reward model: {len(ignored)} annotators are no better than chance and count for nothing")
    if reader.unread and "comments" in kinds_of(wanted.feedback):
        why = ", ".join(f"{n} {reason}" for reason, n in reader.unread.items())
        say(f"reward model: {sum(reader.unread.values())} comments are not read: {why}")
    on_choices = fit_reward_model(
        base,
        train,
        held_out=held_out,
        config=wanted,
        folder=folder,
        seed=config.seed,
        progress=print,
        stage="judge" if half == 1 else "reward_model",
        fits=fits,
    )
    if not first:
        return {}
    measured = on_choices
    true_order = truly_ordered(held_out, make_recipe(config))
    if true_order:
        scales = {name: on_choices[name] for name in ("logit_scale", "temperature")}
        measured = measure(load_ensemble(folder), true_order, **scales)
    record = {
        **_record(on_choices, measured, against="the true order" if true_order else "what people chose"),
        "learnt_from": on_choices["train_items"],
        "n_train": sum(on_choices["train_items"].values()),
        "snapshot": snapshot,
        "ignored_annotators": ignored,
        "half": half,
        "shuffled_labels": wanted.shuffle_labels,
        "seed": config.seed,
        "settings": wanted.model_dump(mode="json"),
    }
    write_card(folder, record, config)
    for line in _remarks(on_choices):
        print(f"reward model: {line}")
    return record


def make_cross_validation(config: Config, base: Path, *, store: str, snapshot: str, fits: Path) -> dict[str, Any]:
    """`reward_model.json`'s `cross_validation`: reward models of all folds judged on what each has not seen."""
    validated = cross_validate(
        base,
        read_frozen(store, snapshot, config=config, say=print),
        config=config.reward_model,
        folds=config.reward_model.cross_validation,
        seed=config.seed,
        progress=print,
        fits=fits,
    )
    return {**validated, **{name: validated[name]["accuracy"] for name in ("longer", "shorter")}}


def check_feedback(feedback: Sequence[Feedback], config: Config) -> None:
    """`DataError` for what no reward model can be learnt from: known before hours of other work."""
    taken_at_its_word = config.reward_model.model_copy(update={"reliability": False})  # which takes longest to find out
    read_sides(
        feedback,
        config.model_copy(update={"reward_model": taken_at_its_word}),
        half=0 if config.reward_model.judge else None,
    )


def read_sides(
    feedback: Sequence[Feedback], config: Config, *, half: int | None = None
) -> tuple[list[Judgement], list[Judgement], Reader]:
    """Judgements to learn from and held-out ones, and how both were read; `DataError` where either side is nothing.

    The same feedback and config give the same sides. `half`: see `make_reward_model`.
    """
    wanted = config.reward_model
    if half is not None:
        feedback = halves(feedback)[half]
    kept = of_aspects(feedback, wanted.aspects)
    if not kept:
        raise DataError(_nothing_to_learn([], feedback, wanted))
    if wanted.cross_validation:  # whose complaint would come hours later
        folds_by_group(kept, group=lambda item: item.group, folds=wanted.cross_validation, seed=config.seed)
    train, held_out = split_by_group(kept, group=lambda item: item.group, held_out=wanted.held_out, seed=config.seed)
    reader = Reader(train, weigh=wanted.reliability, margin=wanted.margin)
    inner, outer = (reader.read(side, all_comments=wanted.feedback == "comments") for side in (train, held_out))
    taught = learnable(inner, wanted)
    if not taught:
        raise DataError(_nothing_to_learn(inner, feedback, wanted))
    rated = _rated_aspects(feedback)
    if unrated := sorted(set(wanted.aspects) - rated) if rated & set(wanted.aspects) else []:
        raise DataError(
            f"nobody rated {', '.join(unrated)}, which reward_model.aspects names; ratings are of "
            f"{', '.join(sorted(rated))}"
        )
    if wanted.limit is not None and half != 1:  # the judge learns from all of its half
        counted_in = taken_apart(taught) if wanted.feedback == "pairs" else taught
        inner = random.Random(f"limit/{config.seed}").sample(counted_in, min(wanted.limit, len(counted_in)))
    return inner, outer, reader


def halves(feedback: Sequence[Feedback]) -> tuple[list[Feedback], list[Feedback]]:
    """The feedback of every second annotator, by name, and that of the others; `DataError` where there is one only."""
    annotators = sorted({item.annotator for item in feedback})
    if len(annotators) < 2:
        raise DataError("reward_model.judge needs feedback of two annotators or more: leave it out")
    first = set(annotators[::2])
    return [item for item in feedback if item.annotator in first], [
        item for item in feedback if item.annotator not in first
    ]


def truly_ordered(items: Sequence[Judgement], recipe: Recipe) -> list[Comparison]:
    """Every two judged answers to a prompt as the gold score orders them, but for those that are about equal."""
    answers: dict[str, list[tuple[float, str]]] = {}
    prompts = {}
    for exchange in exchanges_of(items):
        gold = recipe.gold(exchange.prompt, exchange.response)
        if gold is not None:
            prompts[exchange.prompt.id] = exchange.prompt
            answers.setdefault(exchange.prompt.id, []).append((gold, exchange.response))
    return [
        Comparison(prompts[prompt], better, worse)
        for prompt, known in answers.items()
        for (low, worse), (high, better) in combinations(sorted(known), 2)
        if high - low >= TIE
    ]


def _nothing(line: str) -> None:
    """What every rank but the first says."""


def _nothing_to_learn(read: Sequence[Judgement], feedback: Sequence[Feedback], config: RewardModelConfig) -> str:
    if config.feedback in ("ratings", "joint") and (unknown := sorted(_rated_aspects(feedback) - set(config.aspects))):
        counting = ", ".join(config.aspects)
        return (
            f"the feedback rates {', '.join(unknown)}, and nothing of {counting}, which reward_model.aspects names: "
            f"say what counts, such as reward_model.aspects={{{unknown[0]}: 1.0}}"
        )
    said = f"the feedback holds no {config.feedback} to learn from, but {', '.join(counted(read)) or 'nothing'}"
    if read and all(isinstance(item, Ordered) and len(set(item.ranks)) == 1 for item in read):
        return f"{said} that are all ties, which teach something with reward_model.ties=davidson"
    if config.feedback == "comments":
        said += "; comments are worth something only beside ratings"
    return f"{said}; set reward_model.feedback"


def _rated_aspects(feedback: Sequence[Feedback]) -> set[str]:
    return {item.rating.aspect for item in feedback if item.rating and item.rating.scale != "thumb"}


def _record(on_choices: dict[str, Any], measured: dict[str, Any], *, against: str) -> dict[str, Any]:
    """What a fit and a measurement came to, as `reward_model.json` has it."""
    return {
        "accuracy": measured["accuracy"],
        "accuracy_ci95": measured["accuracy_ci95"],
        "against": against,
        "on_choices": {name: on_choices[name] for name in ("accuracy", "accuracy_ci95")},
        **{
            name: on_choices[name]
            for name in ("by_kind", "gate", "length", "place", "ratings", "thumbs", "sureness", "temperature")
        },
        "margin": measured["margin"],
        "logit_scale": on_choices["logit_scale"],
        "score_std": on_choices["score_std"],
        "confirmed_std": on_choices["confirmed_std"],
        "confirmed_by": on_choices["confirmed_by"],
        "calibration": {
            "ece": measured["ece"],
            "ece_at_temperature": measured["ece_at_temperature"],
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
        "baselines": {name: measured[name]["accuracy"] for name in ("longer", "shorter", "majority")},
        "cross_validation": None,
        "n_held_out": measured["pairs"],
    }


def _remarks(on_choices: dict[str, Any]) -> list[str]:
    """What whoever trusts it should know."""
    remarks = []
    if on_choices["confirmed_std"] is not None and on_choices["score_std"] < 0.99:
        asked, confirmed = on_choices["confirmed_by"], on_choices["confirmed_std"]
        of = "pairs of answers to different prompts" if asked["across_prompts"] else "choices between answers"
        remarks.append(
            f"{asked['choices']} {of}, on {asked['prompts']} prompts, that were not learnt from confirm log-odds of "
            f"{confirmed:.2f} a standard deviation, so its scores vary by {on_choices['score_std']:.3f} and not by 1"
        )
        if on_choices["score_std"] < QUIET:
            remarks.append("PPO will hardly follow it: give it more feedback, or say reward_model.least_std=1")
    gate = on_choices["gate"]
    if gate["better_by"] is None:
        remarks.append(
            "no held-out judgements compare two answers, so nothing shows that it is better than no model; "
            "`rlhf serve` will not promote it"
        )
    elif not gate["passed"]:
        low, high = gate["better_by_ci95"]
        remarks.append(
            f"it is not surely better than no model: on held-out choices {gate['better_by']:+.3f} [{low:+.3f}, "
            f"{high:+.3f}] beside '{gate['baseline']}'; `rlhf serve` will not promote it"
        )
    return remarks
