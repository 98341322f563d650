"""Feedback as a reward model learns from it: answers in order, ratings and thumbs, each with what it counts for."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

from rlhf_ray.types import Exchange, Prompt

Kind = Literal["pairs", "rankings", "ratings", "thumbs", "comments"]
KINDS: tuple[Kind, ...] = ("pairs", "rankings", "ratings", "thumbs", "comments")


@dataclass(frozen=True, slots=True)
class Ordered:
    """Somebody put two answers or more in order."""

    prompt: Prompt
    answers: tuple[str, ...]
    """All different."""
    ranks: tuple[int, ...]
    """1 is the best; who cannot be told apart shares one."""
    margin: float = 0.0
    """Log-odds by which the better one has to win, from how much better somebody said that it is."""
    first: int | None = None
    """Which of them was shown first, where that is known."""
    annotator: str = ""
    weight: float = 1.0

    @property
    def kind(self) -> Kind:
        """Two answers are a pair."""
        return "pairs" if len(self.answers) == 2 else "rankings"

    @property
    def preferences(self) -> Iterator[tuple[int, int]]:
        """(better, worse) of every two that it tells apart, as indices into `answers`."""
        places = range(len(self.answers))
        return ((i, j) for i, j in permutations(places, 2) if self.ranks[i] < self.ranks[j])

    @property
    def exchanges(self) -> list[Exchange]:
        """What it judges."""
        return [Exchange(self.prompt, answer) for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Rated:
    """Somebody gave an answer a number, or words that are worth one."""

    prompt: Prompt
    response: str
    target: float
    """In standard deviations, the annotator's own bias and scale removed."""
    aspect: str = "overall"
    kind: Literal["ratings", "comments"] = "ratings"
    annotator: str = ""
    weight: float = 1.0

    @property
    def exchanges(self) -> list[Exchange]:
        """What it judges."""
        return [Exchange(self.prompt, self.response)]


@dataclass(frozen=True, slots=True)
class Thumbed:
    """Somebody held up a thumb, or down."""

    prompt: Prompt
    response: str
    up: bool
    annotator: str = ""
    weight: float = 1.0

    @property
    def kind(self) -> Kind:
        """As others have it."""
        return "thumbs"

    @property
    def exchanges(self) -> list[Exchange]:
        """What it judges."""
        return [Exchange(self.prompt, self.response)]


Judgement = Ordered | Rated | Thumbed
Judgements = Sequence[Judgement]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of two answers one is better, for whatever reason that is known."""

    prompt: Prompt
    better: str
    worse: str
    kind: Kind = "pairs"
    better_first: bool | None = None
    """Whether the better one was shown before the other; None where that is not known."""


def comparisons(judgements: Iterable[Judgement]) -> list[Comparison]:
    """Every two answers that somebody's order tells apart, or one annotator's ratings of one aspect, or thumbs.

    What words are worth compares nothing: it is a guess.
    """
    found: list[Comparison] = []
    by_rater: defaultdict[tuple[str, str, str | None], list[Rated | Thumbed]] = defaultdict(list)
    for item in judgements:
        if isinstance(item, Ordered):
            for i, j in item.preferences:
                first = None if item.first not in (i, j) else item.first == i
                found.append(Comparison(item.prompt, item.answers[i], item.answers[j], item.kind, first))
        elif item.kind != "comments":
            aspect = item.aspect if isinstance(item, Rated) else None
            by_rater[item.prompt.id, item.annotator, aspect].append(item)
    for rated in by_rater.values():
        for better, worse in permutations(rated, 2):
            if _height(better) > _height(worse) and better.response != worse.response:
                found.append(Comparison(better.prompt, better.response, worse.response, better.kind))
    return found


def matched(judgements: Iterable[Judgement]) -> list[tuple[Exchange, Exchange]]:
    """(better, worse) of answers to different prompts, each of which is in one pair: of each aspect's ratings those
    above the middle with those below, and thumbs up with thumbs down.

    For feedback in which every answer stands alone. Which goes with which is drawn, the same each time.
    """
    heights: defaultdict[str | None, list[tuple[float, Exchange]]] = defaultdict(list)
    for item in judgements:
        if not isinstance(item, Ordered) and item.kind != "comments":
            aspect = item.aspect if isinstance(item, Rated) else None
            heights[aspect].append((_height(item), item.exchanges[0]))
    found: list[tuple[Exchange, Exchange]] = []
    for rated in heights.values():
        random.Random(0).shuffle(rated)
        rated.sort(key=lambda one: one[0])
        half = len(rated) // 2
        lower, upper = rated[:half], rated[len(rated) - half :]
        found += [
            (better, worse)
            for (low, worse), (high, better) in zip(lower, upper, strict=True)
            if low < high and better.prompt.id != worse.prompt.id
        ]
    return found


def exchanges_of(judgements: Iterable[Judgement]) -> list[Exchange]:
    """Every prompt with every judged answer, once, in the order of the judgements."""
    return list(dict.fromkeys(exchange for item in judgements for exchange in item.exchanges))


def counted(judgements: Iterable[Judgement]) -> dict[str, int]:
    """How many there are of each kind."""
    found: dict[str, int] = dict.fromkeys(KINDS, 0)
    for item in judgements:
        found[item.kind] += 1
    return {kind: n for kind, n in found.items() if n}


def taken_apart(judgements: Iterable[Judgement]) -> list[Judgement]:
    """The same with every order as its strict preferences, two answers at a time; ties and the place shown go."""
    found: list[Judgement] = []
    for item in judgements:
        if isinstance(item, Ordered):
            found += [
                replace(item, answers=(item.answers[i], item.answers[j]), ranks=(1, 2), first=None)
                for i, j in item.preferences
            ]
        else:
            found.append(item)
    return found


def _height(item: Rated | Thumbed) -> float:
    return item.target if isinstance(item, Rated) else float(item.up)
