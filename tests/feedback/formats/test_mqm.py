"""Translators' error marks."""

from typing import Any

import pytest

from rlhf_ray.feedback.formats.mqm import gather, read_mqm
from rlhf_ray.feedback.formats.rows import BadRow, Row
from rlhf_ray.feedback.schema import Comment, Rating


def mark(severity: str = "Minor", category: str = "Style/Awkward", **more: Any) -> dict[str, Any]:
    return {
        "system": "online-a", "doc": "talk.1", "seg_id": "7", "rater": "r2", "source": "A light.",
        "target": "Ein <v>helles</v> Licht.", "category": category, "severity": severity, "comment": "",
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("marks", "penalty"),
    [
        ([mark("No-error", "No-error", target="Ein helles Licht.")], 0.0),
        ([mark("Major")], 5.0),
        ([mark("Minor")], 1.0),
        ([mark("Minor", "Fluency/Punctuation")], 0.1),
        ([mark("Major", "Fluency/Punctuation")], 5.0),
        ([mark("Major", "Non-translation!")], 25.0),
        ([mark("Neutral")], 0.0),
        ([mark("Major"), mark("Minor"), mark("Minor", target="<v>Ein</v> helles Licht.")], 7.0),
    ],
)
def test_a_rating_is_minus_the_sum_of_the_errors_weights(marks: list[dict[str, Any]], penalty: float) -> None:
    rating = read_mqm({"marks": marks})[0].what
    assert isinstance(rating, Rating)
    assert (rating.value, rating.scale, rating.high, rating.low) == (pytest.approx(-penalty), "points", 0, None)


def test_each_error_is_a_comment_that_says_where_and_no_mark_is_left() -> None:
    marks = [
        mark("Major", "Accuracy/Mistranslation", comment="too much"),
        mark("Minor", source="A <v>light</v>.", target="Ein helles Licht."),
    ]
    judged = read_mqm({"marks": marks})
    remarks = [item.what.text for item in judged if isinstance(item.what, Comment)]
    assert remarks == ["Major Accuracy/Mistranslation: helles (too much)", "Minor Style/Awkward: light"]
    assert {item.answers[0].text for item in judged} == {"Ein helles Licht."}
    assert {(item.annotator, item.group, item.answers[0].sampler) for item in judged} == {("r2", "talk.1", "online-a")}
    assert {item.messages[0].content for item in judged} == {"A light."}


def test_the_rows_of_one_version_are_one_and_a_broken_one_stands_alone() -> None:
    other = mark(system="online-b")
    rows = [Row(2, mark()), Row(3, mark("Major")), Row(4, {}, "torn"), Row(5, {}, "torn"), Row(6, other)]
    found = list(gather(rows))
    assert [(row.number, row.problem) for row in found] == [(2, None), (4, "torn"), (5, "torn"), (6, None)]
    assert len(found[0].value["marks"]) == 2


def test_a_version_with_two_texts_or_an_unknown_severity_is_refused() -> None:
    with pytest.raises(BadRow, match="differ in their texts"):
        read_mqm({"marks": [mark(), mark(target="Ein Licht.")]})
    with pytest.raises(BadRow, match="no known severity"):
        read_mqm({"marks": [mark("Huge")]})
