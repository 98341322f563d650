"""Feedback read as judgements: everybody's numbers on one scale, and everybody's word for what it is worth."""

import random
import statistics
from typing import Any

import pytest

from rlhf_ray.data.judgements import Judgement, Ordered, Rated, Thumbed, counted
from rlhf_ray.data.reading import Reader, reliabilities
from rlhf_ray.feedback.schema import Answer, Comment, Feedback, Ranking, Rating
from rlhf_ray.types import Message


def said(*texts: str, prompt: str = "p", who: str = "ann", **judgement: Any) -> Feedback:
    return Feedback(
        messages=(Message("user", prompt),),
        prompt_id=prompt,
        group=prompt,
        annotator=who,
        answers=tuple(Answer(text=text, sampler="base") for text in texts),
        **judgement,
    )


def stars(text: str, value: float, **more: Any) -> Feedback:
    return said(text, rating=Rating(value=value), **more)


def ranked(*texts: str, ranks: tuple[int, ...], strength: float | None = None, **more: Any) -> Feedback:
    return said(*texts, ranking=Ranking(ranks=ranks, strength=strength), **more)


def test_a_ranking_is_an_order_and_who_was_shown_first_is_known() -> None:
    item = ranked("a", "b", "c", ranks=(2, 1, 2), display_order=(2, 0, 1))
    assert Reader([item]).read([item]) == [Ordered(item.prompt, ("a", "b", "c"), (2, 1, 2), first=2, annotator="ann")]


def test_answers_that_say_the_same_are_one_at_its_best_place() -> None:
    item = ranked("a", "b", "a", ranks=(3, 2, 1))
    [order] = Reader([item]).read([item])
    assert isinstance(order, Ordered)
    assert (order.answers, order.ranks) == (("a", "b"), (1, 2))
    assert Reader([]).read([ranked("a", "a", ranks=(1, 2))]) == []


def test_all_bad_is_a_thumb_down_for_each() -> None:
    item = said("a", "b", ranking=Ranking(ranks=(1, 1), all_bad=True))
    _, *thumbs = Reader([item]).read([item])
    assert thumbs == [Thumbed(item.prompt, text, up=False, annotator="ann") for text in ("a", "b")]


def test_a_choice_has_to_be_won_by_more_where_it_is_clear() -> None:
    items = [ranked("a", "b", ranks=(1, 2), strength=s, prompt=str(s)) for s in (1.0, 3.0)]
    items.append(ranked("a", "b", ranks=(1, 2), prompt="unsaid"))
    assert [one.margin for one in Reader(items, margin=0.5).read(items) if isinstance(one, Ordered)] == [0.25, 0.75, 0]
    assert {one.margin for one in Reader(items).read(items) if isinstance(one, Ordered)} == {0.0}


def test_how_much_better_is_on_each_ones_own_scale() -> None:
    own = {"ann": (1.0, 2.0, 3.0), "bob": (10.0, 20.0, 30.0)}
    items = [
        ranked("a", "b", ranks=(1, 2), strength=strength, who=who, prompt=f"{number}")
        for who, strengths in own.items()
        for number, strength in enumerate(strengths * 100)
    ]
    margins = [one.margin for one in Reader(items, margin=1.0).read(items) if isinstance(one, Ordered)]
    assert margins[:3] == pytest.approx([0.5, 1, 1.5], rel=0.1)
    assert margins[-3:] == pytest.approx([0.5, 1, 1.5], rel=0.1)


def test_who_said_once_how_much_better_is_read_like_everybody() -> None:
    items = [ranked("a", "b", ranks=(1, 2), strength=s, prompt=str(n)) for n, s in enumerate([1.0, 3.0] * 20)]
    once = ranked("a", "b", ranks=(1, 2), strength=4.0, who="new", prompt="once")
    for train in ([*items, once], items):
        [margin] = [one.margin for one in Reader(train, margin=1.0).read([once]) if isinstance(one, Ordered)]
        assert margin == pytest.approx(4 / 2, rel=0.1)


def test_each_persons_bias_and_scale_are_taken_out() -> None:
    rng = random.Random(0)
    quality = {f"{n}": rng.gauss(0, 1) for n in range(400)}
    rate = {"kind": lambda q: 4 + 0.3 * q, "harsh": lambda q: 2 + 0.9 * q}
    items = [
        said("x", prompt=name, who=who, rating=Rating(value=line(q), scale="points"))
        for name, q in quality.items()
        for who, line in rate.items()
    ]
    read = [item for item in Reader(items, weigh=False).read(items) if isinstance(item, Rated)]
    for item in read:
        assert item.target == pytest.approx(quality[item.prompt.id], abs=0.3)


def test_who_gave_few_ratings_is_read_like_everybody() -> None:
    items = [stars("x", value, prompt=str(n)) for n, value in enumerate([1, 2, 3, 4, 5] * 20)]
    few = stars("x", 5, prompt="few", who="new")
    [target] = [item.target for item in Reader([*items, few]).read([few]) if isinstance(item, Rated)]
    assert target == pytest.approx(2 / statistics.pstdev([1, 2, 3, 4, 5]), rel=0.15)
    [unknown] = [item.target for item in Reader(items).read([few]) if isinstance(item, Rated)]
    assert unknown == pytest.approx(2 / statistics.pstdev([1, 2, 3, 4, 5]), rel=1e-6)


def test_scales_and_aspects_have_lines_of_their_own() -> None:
    items = [stars("x", value, prompt=str(n)) for n, value in enumerate([1, 5] * 10)]
    items += [
        said("x", prompt=str(n), rating=Rating(value=value, scale="points", aspect="tone", low=0, high=100))
        for n, value in enumerate([40, 60] * 10)
    ]
    read = [item for item in Reader(items, weigh=False).read(items) if isinstance(item, Rated)]
    assert {(item.aspect, round(item.target, 6)) for item in read} == {
        (aspect, side) for aspect in ("overall", "tone") for side in (-1.0, 1.0)
    }


def test_a_scale_that_nobody_used_before_says_nothing() -> None:
    train = [stars("x", value, prompt=str(n)) for n, value in enumerate([1, 5] * 10)]
    new = said("y", rating=Rating(value=70.0, scale="points", low=0, high=100))
    assert Reader(train).read([new]) == []


def people(n: int, **wrong: float) -> list[Feedback]:
    """Everybody chooses between, and rates, the same pairs; each of `wrong` gets that share the wrong way round."""
    rng, items = random.Random(0), []
    for number in range(n):
        for who in ("ann", "bob", "cat", "dan", *wrong):
            right = rng.random() >= wrong.get(who, 0.1)
            items.append(ranked("good", "bad", ranks=(1, 2) if right else (2, 1), prompt=str(number), who=who))
    return items


def test_who_chooses_against_the_others_counts_for_nothing_and_the_rest_for_one_in_the_mean() -> None:
    items = people(100, foe=0.9, lazy=0.5)
    found = reliabilities(items)
    assert found["foe"].choices == 0
    assert found["lazy"].choices < 0.3
    assert {name for name in found if found[name].choices > 0.8} == {"ann", "bob", "cat", "dan"}
    read = Reader(items).read(items)
    assert "foe" not in {item.annotator for item in read}
    assert statistics.fmean(item.weight for item in read) == pytest.approx(1, abs=0.01)
    assert len(Reader(items, weigh=False).read(items)) == len(items)


def test_ties_that_everybody_sees_make_nobody_reliable() -> None:
    items = people(100, lazy=0.5)
    for number in range(200):
        for who in ("ann", "bob", "cat", "dan", "lazy"):
            items.append(ranked("one", "other", ranks=(1, 1), prompt=f"alike-{number}", who=who))
    found = reliabilities(items)
    assert found["lazy"].choices < 0.3 < 0.8 < found["ann"].choices


def test_of_people_whose_word_nobody_checked_nothing_is_changed() -> None:
    items = [ranked("good", "bad", ranks=(1, 2), prompt=str(n), who=f"ann-{n % 5}") for n in range(200)]
    assert reliabilities(items) == {}
    assert {item.weight for item in Reader(items).read(items)} == {1.0}


def test_who_rates_the_wrong_way_round_counts_for_nothing() -> None:
    rng, items = random.Random(1), []
    for n in range(80):
        quality = rng.randint(1, 5)
        for who in ("ann", "bob", "cat", "foe"):
            value = 6 - quality if who == "foe" else quality
            noisy = min(5, max(1, value + rng.choice((-1, 0, 0, 1))))
            items.append(stars("x", noisy, prompt=str(n), who=who))
    found = reliabilities(items)
    assert found["foe"].ratings == 0
    assert found["foe"].choices == 0  # of whom nothing else is known
    assert {item.annotator for item in Reader(items).read(items)} == {"ann", "bob", "cat"}


def test_who_rates_an_aspect_the_wrong_way_round_counts_for_nothing_though_another_is_commoner() -> None:
    rng, items = random.Random(1), []
    for n in range(70):
        quality = rng.uniform(1, 5)
        items += [stars("x", quality, prompt=str(n), who=who) for who in ("ann", "bob", "cat")]
        if n < 60:
            for who in ("ann", "bob", "cat", "foe"):
                value = 6 - quality if who == "foe" else quality
                items.append(said("x", prompt=str(n), who=who, rating=Rating(value=value, aspect="tone")))
    found = reliabilities(items)
    assert found["foe"].ratings == 0
    assert found["ann"].ratings == pytest.approx(1, abs=0.01)


def commented(n: int, *, rated: bool, start: int = 0, who: str = "ann") -> list[Feedback]:
    items = []
    for number in range(start, start + n):
        good = number % 2 == 0
        items.append(
            said("x", prompt=str(number), who=who, comment=Comment(text="Great, thanks!" if good else "Rude."))
        )
        if rated:
            items.append(stars("x", 5 if good else 1, prompt=str(number), who=who))
    return items


def test_words_alone_are_worth_what_others_gave_with_such_words() -> None:
    known, alone = commented(40, rated=True), commented(10, rated=False, start=100)
    reader = Reader([*known, *alone])
    read = reader.read([*known, *alone])
    assert counted(read) == {"ratings": 40, "comments": 10}
    weak = [item for item in read if item.kind == "comments"]
    assert {round(item.target, 1) for item in weak if isinstance(item, Rated)} == {-1.0, 1.0}
    assert all(0.8 < item.weight <= 1 for item in weak)
    assert counted(reader.read(known, all_comments=True)) == {"ratings": 40, "comments": 40}


def test_who_counts_for_nothing_teaches_neither_lines_nor_words() -> None:
    items = [item for who in ("bob", "cat") for item in commented(40, rated=True, who=who)] + commented(40, rated=True)
    foe = []
    for number in range(40):  # the same words, the wrong way round, about other answers too, and always harshly
        good = number % 2 == 0
        foe.append(stars("x", 1 if good else 4, prompt=str(number), who="foe"))
        for text in ("x", "y"):
            foe.append(
                said(text, prompt=str(number), who="foe", comment=Comment(text="Great, thanks!" if good else "Rude."))
            )
        foe.append(stars("y", 1 if good else 2, prompt=str(number), who="foe"))
    alone, among = Reader(items), Reader([*items, *foe])
    assert among.reliability["foe"].ratings == 0
    new = stars("x", 5, who="new")
    asked = [*items, new]
    assert [_said_of(item) for item in among.read(asked)] == [_said_of(item) for item in alone.read(asked)]
    assert alone.words is not None
    assert among.words is not None
    assert among.words.read(["Great, thanks!", "Rude."]) == alone.words.read(["Great, thanks!", "Rude."])
    assert {item.annotator for item in among.read([*foe, new], all_comments=True)} == {"new"}


def _said_of(item: Judgement) -> tuple[str, str, float]:
    assert isinstance(item, Rated)
    return item.annotator, item.response, item.target


def test_words_that_nobody_rated_are_left_out() -> None:
    alone = commented(40, rated=False)
    assert Reader(alone).words is None
    assert Reader(alone).read(alone, all_comments=True) == []


def test_comments_that_are_not_read_are_counted_with_why() -> None:
    known = commented(40, rated=True)
    of_two = said("a", "b", comment=Comment(text="Great, thanks!"))
    reader = Reader(known)
    assert len(reader.read([*known, of_two, *commented(4, rated=False, start=100)])) == 40 + 4
    assert reader.unread == {"on several answers at once": 1}
    reader.read([of_two])
    assert reader.unread == {"on several answers at once": 2}  # the held-out side's too

    few = Reader(commented(19, rated=True))
    assert few.read(commented(3, rated=False, start=100)) == []
    assert few.unread == {"with fewer than 20 rated ones to learn words from": 3}


def test_comments_in_words_that_tell_nothing_or_of_whom_nobody_believes_are_counted_too() -> None:
    idle = [said("x", prompt=str(n), comment=Comment(text="Hm.")) for n in range(40)]
    idle += [stars("x", 3, prompt=str(n)) for n in range(40)]
    reader = Reader(idle)
    reader.read([said("y", prompt="new", comment=Comment(text=text)) for text in ("Hm.", "What?")])
    assert reader.unread == {"in words that tell nothing of ratings": 2}

    items = [item for who in ("ann", "bob", "cat") for item in commented(40, rated=True, who=who)]
    items += [stars("x", 1 + 4 * (n % 2), prompt=str(n), who="foe") for n in range(40)]
    reader = Reader(items)
    assert reader.read([said("y", who="foe", comment=Comment(text="Great, thanks!"))]) == []
    assert reader.unread == {"by annotators who count for nothing": 1}


def test_what_is_held_out_teaches_nothing() -> None:
    train = commented(40, rated=True)
    reader = Reader(train)
    before = reader.read(train)
    reader.read([stars("x", 1, prompt=str(n), who="ann") for n in range(500)])
    assert reader.read(train) == before
