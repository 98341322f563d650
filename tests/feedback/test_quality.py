"""People whose ways are known, found by what they said alone."""

import random
from collections.abc import Callable

import pytest
import torch

from rlhf_ray.algo.reliability import area_under_curve
from rlhf_ray.feedback.quality import Person, Quality, quality_of
from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating, Scale
from rlhf_ray.types import Message

Choose = Callable[[list[float], random.Random], tuple[int, int]]
"""From the quality of two answers in the order in which they are shown to their ranks."""


def honest(right: float) -> Choose:
    def choose(quality: list[float], draw: random.Random) -> tuple[int, int]:
        first = (quality[0] > quality[1]) == (draw.random() < right)
        return (1, 2) if first else (2, 1)

    return choose


adversarial = honest(0.1)
"""Turns it round nine times of ten."""
lazy = honest(0.5)
"""Does not look."""


def first_lover(quality: list[float], draw: random.Random) -> tuple[int, int]:
    """Takes the one on the left nine times of ten."""
    return (1, 2) if draw.random() < 0.9 else (2, 1)


def world(ways: dict[str, Choose], *, items: int, overlap: int, seed: int = 0) -> list[Feedback]:
    """Each item judged by so many people, the order drawn for each."""
    draw = random.Random(seed)
    found = []
    for item in range(items):
        answers = [Answer(text=f"answer {item}.{side}", sampler="m") for side in range(2)]
        quality = [draw.random(), draw.random()]
        for name in draw.sample(sorted(ways), overlap):
            order = draw.sample(range(2), 2)
            shown = ways[name]([quality[index] for index in order], draw)
            ranks = tuple(shown[order.index(index)] for index in range(2))
            found.append(
                Feedback(
                    messages=(Message("user", f"question {item}"),),
                    prompt_id=f"p{item}",
                    group="g",
                    annotator=name,
                    answers=tuple(answers),
                    ranking=Ranking(ranks=ranks),
                    display_order=tuple(order),
                )
            )
    return found


def suspicion(quality: Quality, of: str) -> list[float]:
    return [1 - (person.accuracy or 0.0) for person in quality.people if person.name.startswith(of)]


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("way", ["adversarial", "lazy", "first_lover"])
def test_planted_annotators_are_found(way: str, share: float) -> None:
    """40 people, 60 judgements each, two on each item, honest ones right in 0.75 to 0.95; no two bad ones collude.

    The area under the curve over five worlds together: in one world, two bad people among forty say little.
    """
    bad, good = list[float](), list[float]()
    for seed in range(5):
        draw = random.Random(seed)
        count = round(40 * share)
        planted = {
            f"bad-{n}": {"adversarial": adversarial, "lazy": lazy, "first_lover": first_lover}[way]
            for n in range(count)
        }
        people = planted | {f"good-{n}": honest(draw.uniform(0.75, 0.95)) for n in range(40 - count)}
        quality = quality_of(world(people, items=1_200, overlap=2, seed=seed))
        bad += suspicion(quality, "bad")
        good += suspicion(quality, "good")
    assert area_under_curve(torch.tensor(bad), torch.tensor(good)) >= 0.95


def by_name(quality: Quality) -> dict[str, Person]:
    return {person.name: person for person in quality.people}


def test_each_ones_way_is_remarked_upon_and_the_honest_are_left_alone() -> None:
    ways = {f"good-{n}": honest(0.9) for n in range(7)} | {"against": adversarial, "idle": lazy, "left": first_lover}
    quality = quality_of(world(ways, items=600, overlap=3))
    people = by_name(quality)
    assert people["against"].remarks == ("chooses against the others",)
    assert people["idle"].remarks == ("chooses without regard to the others",)
    assert "prefers what is shown first" in people["left"].remarks
    assert [person.name for person in quality.people[:3]] == ["against", "idle", "left"]
    assert not [person.name for person in quality.people[3:] if person.remarks]
    assert people["good-0"].first == pytest.approx(0.5, abs=0.12)


def rated(lines: dict[str, Callable[[float, random.Random], float]], *, items: int, overlap: int) -> list[Feedback]:
    draw = random.Random(0)
    found = []
    for item in range(items):
        quality = draw.gauss(0, 1)
        for name in draw.sample(sorted(lines), overlap):
            value = min(5.0, max(1.0, float(round(lines[name](quality, draw)))))
            found.append(
                Feedback(
                    messages=(Message("user", f"question {item}"),),
                    prompt_id=f"p{item}",
                    group="g",
                    annotator=name,
                    answers=(Answer(text="a", sampler="m"),),
                    rating=Rating(value=value),
                    seconds=1.0 if name == "quick" else 9.0,
                )
            )
    return found


def test_ratings_that_are_kind_flat_or_turned_round_are_told_apart() -> None:
    def line(bias: float, scale: float) -> Callable[[float, random.Random], float]:
        return lambda quality, draw: 3 + bias + scale * quality + draw.gauss(0, 0.4)

    lines = {f"good-{n}": line(0, 0.9) for n in range(6)}
    lines |= {"kind": line(0.8, 0.8), "flat": line(0, 0.0), "turned": line(0, -0.9), "quick": line(0, 0.9)}
    quality = quality_of(rated(lines, items=500, overlap=3))
    people = by_name(quality)
    assert (people["kind"].bias or 0) - (people["good-0"].bias or 0) == pytest.approx(0.7, abs=0.2)
    assert people["flat"].remarks == ("rates without regard to the others",)
    assert people["turned"].remarks == ("rates the wrong way round",)
    assert people["quick"].remarks == ("takes less than 2 s a judgement",)
    assert people["kind"].remarks == people["good-0"].remarks == ()
    (agreement,) = quality.agreement
    assert (agreement.what, agreement.things) == ("stars, overall", 500)


def told(item: int, who: str, value: float, *, scale: Scale = "stars", aspect: str = "overall") -> Feedback:
    return Feedback(
        messages=(Message("user", f"question {item}"),),
        prompt_id=f"p{item}",
        group="g",
        annotator=who,
        answers=(Answer(text="a", sampler="m"),),
        rating=Rating(value=value, scale=scale, aspect=aspect),
    )


def test_a_person_is_known_by_every_aspect_that_was_rated_often_enough() -> None:
    """One rates 60 answers' tone the wrong way round; `overall`, which is the commoner, is right, or not given."""
    draw, items = random.Random(0), []
    for item in range(70):
        quality = draw.random()
        items += [told(item, who, 1 + 4 * quality) for who in ("ann", "bob", "half")]
        if item < 60:
            items += [told(item, who, 1 + 4 * quality, aspect="tone") for who in ("ann", "bob", "cat")]
            items += [told(item, who, 5 - 4 * quality, aspect="tone") for who in ("foe", "half")]
    people = by_name(quality_of(items))
    assert people["foe"].remarks == ("rates the wrong way round",)
    assert (people["foe"].ratings, people["ann"].ratings) == (60, 130)
    assert people["ann"].correlation == pytest.approx(1, abs=0.05)
    assert people["half"].correlation == pytest.approx((70 - 60) / 130, abs=0.05)


def test_thumbs_and_stars_both_tell_and_bias_is_in_points_of_what_one_used_most() -> None:
    draw, items = random.Random(0), []
    lines = {"ann": (3.0, 0.9), "bob": (3.0, 0.9), "cat": (3.0, 0.9), "kind": (3.5, 0.9), "foe": (3.0, -0.9)}
    for item in range(100):
        quality = draw.gauss(0, 1)
        items += [told(item, who, float(quality + draw.gauss(0, 0.3) > 0), scale="thumb") for who in ("ann", "bob")]
        for who, (middle, slope) in lines.items() if item < 50 else ():
            items.append(told(item, who, min(5, max(1, middle + slope * quality + draw.gauss(0, 0.4)))))
    people = by_name(quality_of(items))
    assert people["foe"].remarks == ("rates the wrong way round",)
    assert (people["kind"].bias or 0) - (people["cat"].bias or 0) == pytest.approx(0.5, abs=0.15)
    assert (people["ann"].scale or 0) < 0.6 < (people["cat"].scale or 0)  # a thumb is worth less than a star


def test_what_few_rated_tells_nothing_beside_what_many_did() -> None:
    draw, items = random.Random(0), []
    for item in range(60):
        quality = draw.random()
        items += [told(item, who, 1 + 4 * quality) for who in ("ann", "bob", "cat")]
    alone = quality_of(items)
    items += [told(item, who, draw.randint(1, 5), aspect="tone") for item in range(5) for who in ("ann", "bob", "cat")]
    figures = [(person.ratings, person.bias, person.scale, person.correlation) for person in alone.people]
    assert figures == [(p.ratings, p.bias, p.scale, p.correlation) for p in quality_of(items).people]


def test_agreement_and_consistency_by_hand() -> None:
    """Two people, four items: the same in three of them."""

    def choice(item: int, who: str, ranks: tuple[int, int]) -> Feedback:
        answers = tuple(Answer(text=text, sampler="m") for text in ("yes", "no"))
        return Feedback(
            messages=(Message("user", "q"),),
            prompt_id=f"p{item}",
            group="g",
            annotator=who,
            answers=answers,
            ranking=Ranking(ranks=ranks),
        )

    first, second, tie = (1, 2), (2, 1), (1, 1)
    said = [(0, first, first), (1, second, second), (2, tie, tie), (3, first, second)]
    items = [choice(item, who, ranks) for item, *both in said for who, ranks in zip(("ann", "ben"), both, strict=True)]
    items += [choice(0, "ann", first), choice(1, "ann", first), choice(9, "cat", first)]
    quality = quality_of(items)
    (agreement,) = quality.agreement
    # n_first = 3, n_second = 3, n_tie = 2 of 8; 2 of 8 apart: 1 - 7 * 2 / (64 - 9 - 9 - 4)
    assert agreement.alpha == pytest.approx(1 - 7 * 2 / 42)
    assert agreement.things == 4
    people = by_name(quality)
    assert people["ann"].consistent == 0.5
    assert (people["cat"].choices, people["cat"].accuracy, people["cat"].remarks) == (0, None, ())


def test_nothing_is_said_of_nothing() -> None:
    assert quality_of([]) == Quality((), ())
