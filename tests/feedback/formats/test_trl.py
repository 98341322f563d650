"""TRL's types, there and back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.feedback.formats import trl
from rlhf_ray.feedback.formats.judged import Judged, Seen, Unsayable, feedback_of
from rlhf_ray.feedback.formats.rows import BadRow
from rlhf_ray.feedback.schema import Feedback, Ranking, Rating
from rlhf_ray.types import Message
from tests.feedback.formats.examples import WORDS, feedback, ranked


def kept(judged: Judged) -> Feedback:
    return feedback_of(judged, annotator="ann", sampler="them", seen=Seen())


USER = [{"role": "user", "content": "Help me"}]


@pytest.mark.parametrize("prompt", ["Help me", USER])
@pytest.mark.parametrize("chosen", ["Gladly.", [{"role": "assistant", "content": "Gladly."}]])
def test_pairs_are_texts_or_turns(prompt: Any, chosen: Any) -> None:
    (judged,) = trl.read_preference({"prompt": prompt, "chosen": chosen, "rejected": "No.", "score": 0.3})
    item = kept(judged)
    assert item.messages == (Message("user", "Help me"),)
    assert [(better.text, worse.text) for better, worse in item.preferences] == [("Gladly.", "No.")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt": None}, "no text under 'prompt'"),
        ({"prompt": " "}, "empty 'prompt'"),
        ({"prompt": []}, "the prompt does not end with the user's turn"),
        ({"prompt": [{"role": "system", "content": "Be kind"}]}, "the prompt does not end with the user's turn"),
        ({"prompt": ["Help"]}, "a turn without a known role"),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "a turn without a known role"),
        ({"prompt": [{"role": "user", "content": 3}]}, "a turn without text"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, "a turn is not valid Unicode"),
        ({"prompt": [{"role": "user", "content": " "}]}, "empty turn in the prompt"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "'chosen' is not one assistant turn"),
        ({"chosen": "x" * 100_001}, "chosen answer above 100,000 characters"),
        ({"chosen": "\ud800"}, "chosen answer is not valid Unicode"),
        ({"chosen": " "}, "empty chosen answer"),
        ({"rejected": None}, "no text under 'rejected'"),
        ({"rejected": "Gladly."}, "the two answers are the same"),
    ],
)
def test_a_bad_pair_says_why(changes: dict[str, Any], problem: str) -> None:
    row = {"prompt": "Help me", "chosen": "Gladly.", "rejected": "No."} | changes
    with pytest.raises(BadRow) as error:
        trl.read_preference(row)
    assert str(error.value) == problem


def test_where_the_prompt_is_implicit_it_is_what_both_begin_with() -> None:
    """TRL's own example: a space before the first difference belongs to the answers."""
    (judged,) = trl.read_preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert judged.messages == (Message("user", "The sky is"),)
    assert {said.text for said in judged.answers} == {" blue.", " green."}
    turns = [[*USER, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    (judged,) = trl.read_preference({"chosen": turns[0], "rejected": turns[1]})
    assert judged.messages == (Message("user", "Help me"),)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "The sky", "rejected": "The sky is"}, "empty chosen answer"),
        ({"chosen": "Yes", "rejected": "No"}, "empty turn in the prompt"),
        ({"chosen": USER, "rejected": "text"}, "no list of turns under 'rejected'"),
        ({"chosen": USER, "rejected": []}, "the two dialogues differ before the last answer"),
        ({"chosen": USER, "rejected": USER}, "'chosen' is not one assistant turn"),
        ({}, "no text under 'chosen'"),
    ],
)
def test_a_bad_implicit_pair_says_why(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        trl.read_preference(row)


@given(item=ranked(), implicit=st.booleans())
def test_a_choice_comes_back_from_turns(item: Feedback, implicit: bool) -> None:
    write = trl.write_implicit if implicit else trl.write_preference
    try:
        rows = write(item, conversational=True)
    except Unsayable:
        assert not item.preferences
        return
    again = [kept(judged) for row in rows for judged in trl.read_preference(row)]
    assert [row for one in again for row in write(one, conversational=True)] == rows
    assert {one.messages for one in again} == {item.messages}
    told = [(better.text, worse.text) for better, worse in item.preferences]
    assert [(better.text, worse.text) for one in again for better, worse in one.preferences] == told


@given(item=ranked(dialogues=False), implicit=st.booleans())
def test_a_choice_comes_back_from_text(item: Feedback, implicit: bool) -> None:
    """Of implicit prompts the rows: where one answer begins as the other one does, nobody can say where it began."""
    write = trl.write_implicit if implicit else trl.write_preference
    try:
        rows = write(item, conversational=False)
        again = [kept(judged) for row in rows for judged in trl.read_preference(row)]
    except (Unsayable, BadRow):
        assert implicit or not item.preferences
        return
    assert [row for one in again for row in write(one, conversational=False)] == rows
    if not implicit:
        assert {one.messages for one in again} == {item.messages}


@given(turns=st.lists(WORDS, min_size=1, max_size=1), answer=WORDS, up=st.booleans(), conversational=st.booleans())
def test_a_thumb_comes_back(turns: list[str], answer: str, up: bool, conversational: bool) -> None:
    item = feedback(turns, [answer], rating=Rating(value=float(up), scale="thumb"))
    (row,) = trl.write_unpaired(item, conversational=conversational)
    assert row["label"] is up
    (judged,) = trl.read_unpaired(row)
    again = kept(judged)
    assert (again.messages, again.answers, again.rating) == (item.messages, item.answers, item.rating)


@pytest.mark.parametrize("label", [1, "true", None])
def test_a_label_is_true_or_false(label: Any) -> None:
    with pytest.raises(BadRow, match="no true or false"):
        trl.read_unpaired({"prompt": "q", "completion": "a", "label": label})


def test_stars_that_are_plain_are_thumbs() -> None:
    def row(value: float) -> dict[str, Any]:
        return trl.write_unpaired(feedback(["q"], ["a"], rating=Rating(value=value)), conversational=False)[0]

    assert [row(value)["label"] for value in (1, 2.5, 3.5, 5)] == [False, False, True, True]
    with pytest.raises(Unsayable, match="neither up nor down"):
        row(3)


def test_a_dialogue_is_not_written_as_text() -> None:
    with pytest.raises(Unsayable, match="--conversational"):
        trl.write_prompt(feedback(["q", "a", "q"], ["a"], rating=Rating(value=1)), conversational=False)


def test_prompts_alone_and_with_the_answer_liked_best() -> None:
    item = feedback(["q"], ["a", "b", "c"], ranking=Ranking(ranks=(2, 1, 2)))
    assert trl.write_prompt(item, conversational=False) == [{"prompt": "q"}]
    assert trl.write_completion(item, conversational=False) == [{"prompt": "q", "completion": "b"}]
    liked = feedback(["q"], ["a"], rating=Rating(value=1, scale="thumb"))
    assert trl.write_completion(liked, conversational=True) == [
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    ]


@pytest.mark.parametrize(
    "item",
    [
        feedback(["q"], ["a", "b"], ranking=Ranking(ranks=(1, 1))),
        feedback(["q"], ["a", "b"], ranking=Ranking(ranks=(1, 2), all_bad=True)),
        feedback(["q"], ["a"], rating=Rating(value=2)),
        feedback(["q"], ["a"], rating=Rating(value=9, scale="points")),
    ],
)
def test_what_nobody_liked_best_is_no_completion(item: Feedback) -> None:
    with pytest.raises(Unsayable):
        trl.write_completion(item, conversational=False)
