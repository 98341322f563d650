import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback.schema import (
    MAX_COMMENT,
    Ranking,
    canonical_json,
    competition_ranks,
    parse_feedback,
    to_json,
)
from rlhf_ray.types import Message, Prompt


def a_row(*texts: str, **changes: Any) -> dict[str, Any]:
    row = {
        "messages": [{"role": "user", "content": "My lamp broke."}],
        "prompt_id": "p1",
        "group": "g1",
        "annotator": "ann-1",
        "answers": [{"text": text, "sampler": "base-policy"} for text in texts or ("We will send another.",)],
    }
    return row | changes


def test_a_rating_keeps_who_sampled_the_answer_and_how() -> None:
    answer = {
        "text": "Sorry!",
        "sampler": "ppo",
        "sampling": {"temperature": 0.7, "stop": None},
        "policy_version": 3,
        "completion_id": None,
    }
    feedback = parse_feedback(a_row(answers=[answer], rating={"value": 4}))
    assert feedback.answers[0].model_dump() == answer
    assert feedback.prompt == Prompt("p1", (Message("user", "My lamp broke."),), "g1")
    assert feedback.kind == "rating"


@pytest.mark.parametrize("value", [0, 0.99, 5.01, 7, -1, 1e308, math.nan, math.inf, True, "3", None])
def test_an_impossible_rating_is_refused(value: Any) -> None:
    with pytest.raises(FeedbackError, match="rating"):
        parse_feedback(a_row(rating={"value": value}))


@pytest.mark.parametrize("value", [1, 5, 2.5])
def test_a_possible_rating_is_taken(value: float) -> None:
    assert parse_feedback(a_row(rating={"value": value})).rating.value == value


def test_a_thumb_is_nought_or_one() -> None:
    assert parse_feedback(a_row(rating={"value": 0, "scale": "thumb"})).rating.value == 0
    with pytest.raises(FeedbackError, match="a thumb is 0"):
        parse_feedback(a_row(rating={"value": 0.5, "scale": "thumb"}))


@pytest.mark.parametrize("text", ["", "  \n\t", "\u3000"])
def test_an_empty_answer_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(FeedbackError, match=r"answers\.1\.text: the text is empty"):
        parse_feedback(a_row("fine", text, ranking={"ranks": [1, 2]}))


@pytest.mark.parametrize("ranks", [[0, 1], [1, 3], [1, 2, 2, 3], [2, 2], [1, 1.5], [True, 2], [1], []])
def test_ranks_that_are_no_ranking_are_refused(ranks: list[Any]) -> None:
    with pytest.raises(FeedbackError, match="rank"):
        parse_feedback(a_row(*"abcd"[: len(ranks)], ranking={"ranks": ranks}))


@pytest.mark.parametrize("ranks", [[1, 2], [1, 1], [4, 2, 1, 2], [1] * 16])
def test_a_ranking_may_have_ties(ranks: list[int]) -> None:
    assert parse_feedback(a_row(*"abcdefghijklmnop"[: len(ranks)], ranking={"ranks": ranks})).ranking.ranks == tuple(
        ranks
    )


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=16))
def test_ranks_made_from_scores_are_always_a_ranking_in_their_order(scores: list[float]) -> None:
    ranks = Ranking(ranks=competition_ranks(scores)).ranks
    assert all(
        (a > b) == (i < j) for a, i in zip(scores, ranks, strict=True) for b, j in zip(scores, ranks, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, "exactly one of"),
        ({"rating": {"value": 3}, "comment": {"text": "x"}}, "got rating, comment"),
        ({"comment": {"text": "x" * (MAX_COMMENT + 1)}}, "comment.text"),
        ({"comment": {"text": " "}}, "the text is empty"),
        ({"comment": {"text": "x"}, "answers": []}, "0 answers"),
        ({"comment": {"text": "x"}, "answers": a_row(*"abcdefghijklmnopq")["answers"]}, "17 answers"),
        ({"rating": {"value": 3}, "answers": a_row("a", "b")["answers"]}, "one rating an answer"),
        ({"ranking": {"ranks": [1, 2, 3]}}, "3 ranks for 1 answers"),
        ({"comment": {"text": "x"}, "display_order": [1]}, "display_order"),
        ({"comment": {"text": "x"}, "messages": []}, "the prompt"),
        ({"comment": {"text": "x"}, "messages": [{"role": "user", "content": " "}]}, "the prompt"),
        ({"comment": {"text": "x"}, "messages": [{"role": "assistant", "content": "Hi"}]}, "assistant's turn"),
        ({"comment": {"text": "x"}, "messages": [{"role": "tool", "content": "Hi"}]}, r"messages.0.role"),
        ({"comment": {"text": "x"}, "messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
        ({"comment": {"text": "\ud800"}}, "unicode"),
        ({"comment": {"text": "x"}, "annotator": ""}, "annotator"),
        ({"comment": {"text": "x"}, "id": "../../x"}, "id"),
        ({"comment": {"text": "x"}, "created_at": "2026-01-02T03:04:05"}, "timezone"),
        ({"comment": {"text": "x"}, "stars": 5}, "stars"),
    ],
)
def test_what_no_annotator_can_have_meant_is_refused_in_one_line(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FeedbackError, match=complaint) as error:
        parse_feedback(a_row(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampling", [{"top_p": math.inf}, {"name": "\ud800"}])
def test_sampling_that_json_cannot_carry_is_refused(sampling: dict[str, Any]) -> None:
    answer = {"text": "a", "sampler": "s", "sampling": sampling}
    with pytest.raises(FeedbackError, match=r"answers\.0\.sampling"):
        parse_feedback(a_row(answers=[answer], rating={"value": 3}))


def test_a_refusal_does_not_repeat_what_people_wrote() -> None:
    with pytest.raises(FeedbackError) as error:
        parse_feedback(a_row(comment={"text": "my secret " * 1_000}))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"id": NaN}', "[" * 100_000])
def test_text_that_holds_no_feedback_is_refused(text: str) -> None:
    with pytest.raises(FeedbackError, match="feedback is refused"):
        parse_feedback(text)


def test_times_are_kept_in_utc() -> None:
    feedback = parse_feedback(a_row(rating={"value": 3}, created_at="2026-01-02T03:04:05+02:00"))
    assert feedback.created_at == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)
    assert json.loads(to_json(feedback))["created_at"] == "2026-01-02T01:04:05.000000Z"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.text(min_size=1).filter(str.strip), st.dictionaries(st.text(), json_values, max_size=3))
def test_feedback_comes_back_from_its_json_unchanged(text: str, sampling: dict[str, Any]) -> None:
    answers = [{"text": text, "sampler": "s", "sampling": sampling}, {"text": "b", "sampler": "t"}]
    feedback = parse_feedback(a_row(answers=answers, ranking={"ranks": [2, 1]}, display_order=[1, 0]))
    assert parse_feedback(to_json(feedback)) == feedback
    assert to_json(parse_feedback(to_json(feedback))) == to_json(feedback)


def test_canonical_json_has_one_spelling_and_no_nan() -> None:
    assert canonical_json({"b": 1.0, "a": "é"}) == '{"a":"é","b":1.0}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(math.nan)
