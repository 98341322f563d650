from dataclasses import replace

from rlhf_ray.data.judgements import (
    Comparison,
    Ordered,
    Rated,
    Thumbed,
    comparisons,
    counted,
    exchanges_of,
    matched,
    taken_apart,
)
from rlhf_ray.types import Exchange, Message, Prompt

PROMPT = Prompt("p", (Message("user", "Hi"),), "g")
OTHER = Prompt("q", (Message("user", "Hello"),), "g")


def pairs(*items: Ordered | Rated | Thumbed) -> list[tuple[str, str]]:
    return [(pair.better, pair.worse) for pair in comparisons(items)]


def test_an_order_gives_each_strict_preference_once() -> None:
    ranking = Ordered(PROMPT, ("a", "b", "c"), (2, 3, 1))
    assert sorted(pairs(ranking)) == [("a", "b"), ("c", "a"), ("c", "b")]
    assert pairs(Ordered(PROMPT, ("a", "b", "c"), (1, 1, 3))) == [("a", "c"), ("b", "c")]


def test_a_comparison_knows_whether_the_better_one_was_shown_first() -> None:
    [pair] = comparisons([Ordered(PROMPT, ("a", "b"), (2, 1), first=0)])
    assert pair == Comparison(PROMPT, "b", "a", "pairs", better_first=False)
    three = comparisons([Ordered(PROMPT, ("a", "b", "c"), (1, 2, 3), first=2)])
    assert [(pair.better, pair.worse, pair.better_first) for pair in three] == [
        ("a", "b", None),
        ("a", "c", False),
        ("b", "c", False),
    ]


def test_ratings_are_compared_where_one_person_gave_them_to_one_prompt_in_one_aspect() -> None:
    items = [
        Rated(PROMPT, "a", 1.0, annotator="ann"),
        Rated(PROMPT, "b", 0.0, annotator="ann"),
        Rated(PROMPT, "c", -1.0, annotator="bob"),
        Rated(PROMPT, "d", -1.0, annotator="ann", aspect="tone"),
        Rated(OTHER, "e", -1.0, annotator="ann"),
    ]
    assert pairs(*items) == [("a", "b")]


def test_thumbs_compare_up_with_down_and_what_words_are_worth_compares_nothing() -> None:
    thumbs = [Thumbed(PROMPT, "a", up=True), Thumbed(PROMPT, "b", up=False), Thumbed(PROMPT, "c", up=True)]
    assert pairs(*thumbs) == [("a", "b"), ("c", "b")]
    assert pairs(Rated(PROMPT, "a", 1.0, kind="comments"), Rated(PROMPT, "b", 0.0, kind="comments")) == []


def test_answers_to_different_prompts_are_matched_the_upper_half_with_the_lower() -> None:
    """Of five ratings the middle one stands alone; of four thumbs one points down, and of two aspects none is mixed."""
    rated = [Rated(Prompt(f"{n}", (), f"{n}"), "a", float(n)) for n in (4, 1, 3, 0, 2)]
    assert {(better.prompt.id, worse.prompt.id) for better, worse in matched(rated)} == {("3", "0"), ("4", "1")}
    thumbs = [Thumbed(Prompt(f"{n}", (), f"{n}"), "a", up=n > 0) for n in range(4)]
    [(better, worse)] = matched(thumbs)
    assert (worse.prompt.id, better.prompt.id in "123") == ("0", True)
    other = [replace(item, aspect="tone") for item in rated[:1]]
    assert matched([*rated[:1], *other]) == []
    assert matched([Rated(PROMPT, "a", 1.0), Rated(PROMPT, "b", 0.0)]) == []  # which compare as they are
    assert matched([replace(item, kind="comments") for item in rated]) == matched([]) == []


def test_kinds_are_told_apart_and_answers_are_named_once() -> None:
    items = [
        Ordered(PROMPT, ("a", "b"), (1, 2)),
        Ordered(PROMPT, ("a", "b", "c"), (1, 2, 3)),
        Rated(PROMPT, "c", 1.0),
        Rated(OTHER, "c", 1.0, kind="comments"),
    ]
    assert counted(items) == {"pairs": 1, "rankings": 1, "ratings": 1, "comments": 1}
    assert exchanges_of(items) == [*(Exchange(PROMPT, text) for text in "abc"), Exchange(OTHER, "c")]


def test_an_order_taken_apart_is_its_strict_preferences() -> None:
    order = Ordered(PROMPT, ("a", "b", "c"), (1, 2, 2), margin=0.5, first=0, annotator="ann", weight=2.0)
    apart = taken_apart([order, Rated(PROMPT, "a", 1.0)])
    told = {"margin": 0.5, "annotator": "ann", "weight": 2.0}
    assert apart == [
        Ordered(PROMPT, ("a", "b"), (1, 2), **told),
        Ordered(PROMPT, ("a", "c"), (1, 2), **told),
        Rated(PROMPT, "a", 1.0),
    ]
