"""What a reward model is worth on choices that it has not seen, and what no model at all would be worth there."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from rlhf_ray.algo.clusters import Estimate, auc, jackknife_of, mean_of, share_of, spearman
from rlhf_ray.algo.ranking import expected_calibration_error, reliability_bins
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Comparison, Judgement, Kind, Rated, Thumbed, comparisons
from rlhf_ray.models.ensemble import Ensemble
from rlhf_ray.training.reward.objective import learnable
from rlhf_ray.types import Exchange

FEWEST_RATED = 3
"""Answers to a prompt before their order by a model is compared with that by ratings."""


class Scoring(Protocol):
    """A reward model, or several."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """One number an exchange, in their order."""


def measure(
    reward_model: Scoring, pairs: Sequence[Comparison], *, logit_scale: float = 1.0, temperature: float | None = None
) -> dict[str, Any]:
    """How well a reward model predicts choices: `judged_by` its margins, and how far it can be believed.

    A choice's predicted probability is sigmoid(logit_scale * margin); `ece_at_temperature` is the calibration error of
    sigmoid(logit_scale * margin / temperature). None stands for what cannot be told, all of it where there are no
    choices.
    """
    margins = margins_of(reward_model, pairs)
    right = _right(margins)

    def confidence(scale: float) -> torch.Tensor:
        return torch.sigmoid(scale * torch.tensor(margins).abs())

    tempered = confidence(logit_scale / temperature) if margins and temperature else None
    return {
        **judged_by(margins, pairs),
        "margin": statistics.fmean(margins) if margins else None,
        "ece": expected_calibration_error(confidence(logit_scale), right) if margins else None,
        "ece_at_temperature": None if tempered is None else expected_calibration_error(tempered, right),
        "bins": [asdict(bar) for bar in reliability_bins(confidence(logit_scale), right)],
    }


def judged_by(margins: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any]:
    """Accuracy of margins beside the baselines; intervals are over groups of prompts. A margin of 0 is half right."""
    right = _right(margins)
    return {
        **_accuracy(right, pairs),
        **baselines(pairs),
        "gate": gate(right, pairs),
        "length": length_bias(margins, pairs),
        "place": place_bias(margins, pairs),
    }


def by_kind(margins: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any]:
    """Accuracy by the kind of feedback that a choice comes from."""
    kinds: dict[Kind, list[int]] = {}
    for place, pair in enumerate(pairs):
        kinds.setdefault(pair.kind, []).append(place)
    return {kind: _at(places, margins, pairs) for kind, places in kinds.items()}


def how_sure(ensemble: Ensemble, pairs: Sequence[Comparison]) -> dict[str, Any] | None:
    """Accuracy on the half of the choices where its opinions on them agree most, and on the other; their mean spread on
    an answer. What its doubt is good for shows in the difference. None where it has no two opinions.
    """
    exchanges = [Exchange(pair.prompt, text) for pair in pairs for text in (pair.better, pair.worse)]
    opinions = ensemble.opinions(exchanges)
    if opinions.shape[1] < 2 or len(pairs) < 2:
        return None
    doubt = (opinions[::2] - opinions[1::2]).std(1, correction=0).tolist()
    margins = margins_of(ensemble, pairs)
    order = sorted(range(len(pairs)), key=lambda place: doubt[place])
    half = len(order) // 2
    return {
        "spread": float(opinions.std(1, correction=0).mean()),
        "surest": _at(order[:half], margins, pairs),
        "least_sure": _at(order[half:], margins, pairs),
    }


def told_by(judgements: Sequence[Judgement], config: RewardModelConfig) -> list[Comparison]:
    """The choices by which a model that learns by this config is judged: of what teaches it, where that compares."""
    return comparisons(learnable(judgements, config)) or comparisons(judgements)


def baselines(pairs: Sequence[Comparison]) -> dict[str, Any]:
    """What always preferring the longer answer, the shorter, or whatever place wins more often would get right.

    Answers of equal length, and those of which nobody noted the place, count half.
    """
    return {name: _accuracy(right, pairs) for name, right in _trivial(pairs).items()}


def gate(right: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any]:
    """Whether it is better, for sure, than what needs no model: the best of the `baselines`, pair by pair.

    `better_by` is the difference of accuracies, and its interval has to lie above 0. Nothing is for sure where no
    choices tell; all but `passed` is None there.
    """
    if not pairs:
        unknown = dict.fromkeys(("baseline", "baseline_accuracy", "better_by", "better_by_ci95"))
        return {"passed": False, **unknown}
    best, of_best = max(_trivial(pairs).items(), key=lambda item: sum(item[1]))
    groups = [pair.prompt.group for pair in pairs]
    found = mean_of([mine - its for mine, its in zip(right, of_best, strict=True)], groups)
    return {
        "passed": found.low > 0,
        "baseline": best,
        "baseline_accuracy": statistics.fmean(of_best),
        "better_by": found.value,
        "better_by_ci95": _ends(found),
    }


def length_bias(margins: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any]:
    """How far margins follow length: their rank correlation with it, and accuracy where the better one is longer, and
    where it is shorter. Alike in both, and a model does not go by length; what people prefer may.
    """
    gaps = [float(len(pair.better) - len(pair.worse)) for pair in pairs]
    sides = {"longer_is_better": 1, "shorter_is_better": -1}
    told = {name: [place for place, gap in enumerate(gaps) if gap * side > 0] for name, side in sides.items()}
    # each pair once each way round, or the labels would be part of it
    return {
        "correlation": spearman([*margins, *(-m for m in margins)], [*gaps, *(-gap for gap in gaps)]),
        **{name: _at(places, margins, pairs) for name, places in told.items()},
    }


def place_bias(margins: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any]:
    """How often people preferred what was shown first, and whether the model, which does not see it, is as right where
    they did. None where nobody noted the order.
    """
    known = [place for place, pair in enumerate(pairs) if pair.better_first is not None]
    if not known:
        return {"first_preferred": None, "first_is_better": None, "first_is_worse": None}
    first = share_of([float(bool(pairs[place].better_first)) for place in known], _groups(pairs, known))
    return {
        "first_preferred": {"share": first.value, "ci95": _ends(first)},
        "first_is_better": _at([place for place in known if pairs[place].better_first], margins, pairs),
        "first_is_worse": _at([place for place in known if not pairs[place].better_first], margins, pairs),
    }


def margins_of(reward_model: Scoring, pairs: Sequence[Comparison]) -> list[float]:
    """The better answer's score less the worse one's; each distinct answer is scored once."""
    exchanges = list({Exchange(pair.prompt, text): None for pair in pairs for text in (pair.better, pair.worse)})
    score = dict(zip(exchanges, reward_model.score(exchanges), strict=True))
    return [score[Exchange(pair.prompt, pair.better)] - score[Exchange(pair.prompt, pair.worse)] for pair in pairs]


def order_of_ratings(scores: Sequence[float], ratings: Sequence[Rated]) -> dict[str, Any] | None:
    """How far scores, one a rating, order answers as ratings do: the rank correlation over all of them (`overall`), and
    its mean over what one annotator said of one prompt's answers (`within`), which has nothing of prompts being harder
    or easier. Intervals are over groups of prompts. None without ratings.
    """
    if not ratings:
        return None
    targets, groups = [item.target for item in ratings], [item.prompt.group for item in ratings]

    def over(places: Sequence[int]) -> float | None:
        return spearman([scores[place] for place in places], [targets[place] for place in places])

    overall = jackknife_of(over, groups)
    together: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, item in enumerate(ratings):
        together[item.prompt.id, item.annotator, item.aspect].append(place)
    ordered = [
        places
        for places in together.values()
        if len(places) >= FEWEST_RATED and len({targets[place] for place in places}) > 1
    ]
    within = mean_of([over(places) or 0.0 for places in ordered], [groups[p[0]] for p in ordered]) if ordered else None
    return {"overall": _told(overall), "within": _told(within)}


def order_of_thumbs(scores: Sequence[float], thumbs: Sequence[Thumbed]) -> dict[str, Any] | None:
    """The chance that an answer with a thumb up has a higher score than one with a thumb down, whatever their prompts
    (`auc`), with an interval over groups of prompts. None where thumbs point one way only.
    """
    up = [item.up for item in thumbs]
    found = jackknife_of(
        lambda places: auc([scores[place] for place in places], [up[place] for place in places]),
        [item.prompt.group for item in thumbs],
    )
    return None if found is None else {"auc": found.value, **_over(found)}


def thumbs_among(judgements: Sequence[Judgement]) -> list[Thumbed]:
    """What people held up a thumb to, or down."""
    return [item for item in judgements if isinstance(item, Thumbed)]


def ratings_among(judgements: Sequence[Judgement]) -> list[Rated]:
    """What people gave numbers to."""
    return [item for item in judgements if isinstance(item, Rated) and item.kind == "ratings"]


def how_right(record: Mapping[str, Any]) -> str:
    """What a record of a reward model, or of a cross-validation, comes to, in a line."""
    said = []
    if record["accuracy"] is not None:
        low, high = record["accuracy_ci95"]
        pairs = record.get("pairs", record.get("n_held_out"))
        said.append(f"accuracy {record['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {pairs} held-out pairs")
    for name, found, key in (
        ("rank correlation with", (record.get("ratings") or {}).get("overall"), "spearman"),
        ("area under the ROC curve of", record.get("thumbs"), "auc"),
    ):
        if found is not None:
            low, high = found["ci95"]
            of = "ratings" if key == "spearman" else "thumbs"
            said.append(f"{name} {found['n']} held-out {of} {found[key]:.3f} [{low:.3f}, {high:.3f}]")
    return "; ".join(said) or "nothing that was held out says how good it is"


def _trivial(pairs: Sequence[Comparison]) -> dict[str, list[float]]:
    longer = [_half(len(pair.better) - len(pair.worse)) for pair in pairs]
    first = [0.5 if pair.better_first is None else float(pair.better_first) for pair in pairs]
    majority = first if sum(first) >= len(first) / 2 else [1 - one for one in first]
    return {"longer": longer, "shorter": [1 - one for one in longer], "majority": majority}


def _right(margins: Sequence[float]) -> list[float]:
    return [_half(margin) for margin in margins]


def _half(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _accuracy(right: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any]:
    if not pairs:
        return {"accuracy": None, "accuracy_ci95": None, "pairs": 0, "groups": 0}
    found = share_of(right, [pair.prompt.group for pair in pairs])
    return {"accuracy": found.value, "accuracy_ci95": _ends(found), "pairs": found.count, "groups": found.groups}


def _at(places: Sequence[int], margins: Sequence[float], pairs: Sequence[Comparison]) -> dict[str, Any] | None:
    if not places:
        return None
    return _accuracy(_right([margins[place] for place in places]), [pairs[place] for place in places])


def _groups(pairs: Sequence[Comparison], places: Sequence[int]) -> list[str]:
    return [pairs[place].prompt.group for place in places]


def _told(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"spearman": found.value, **_over(found)}


def _over(found: Estimate) -> dict[str, Any]:
    return {"ci95": _ends(found), "n": found.count, "groups": found.groups}


def _ends(found: Estimate) -> list[float]:
    """Nothing here can lie beyond 1, or below -1, and nothing is all that a single group says."""
    return [max(found.low, -1.0), min(found.high, 1.0)]
