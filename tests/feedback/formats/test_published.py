"""Published datasets, row by row as they write it."""

from typing import Any

import pytest
from hypothesis import given

from rlhf_ray.feedback.formats import published
from rlhf_ray.feedback.formats.judged import Judged, Seen, Unsayable, feedback_of
from rlhf_ray.feedback.formats.rows import BadRow
from rlhf_ray.feedback.schema import Feedback, Ranking, Rating
from rlhf_ray.types import Message
from tests.feedback.formats.examples import TRIMMED, feedback, ranked

START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Help me"


def kept(judged: Judged) -> Feedback:
    return feedback_of(judged, annotator="ann", sampler="them", seen=Seen())


def hh(
    chosen: str = " Gladly.", rejected: str = " No.", *, start: str = START, other: str | None = None
) -> dict[str, Any]:
    after = "\n\nAssistant:"
    return {"chosen": start + after + chosen, "rejected": (other or start) + after + rejected}


def test_a_dialogue_is_split_into_turns_and_two_answers() -> None:
    (judged,) = published.read_hh(hh())
    item = kept(judged)
    assert [(turn.role, turn.content) for turn in item.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Help me"),
    ]
    assert [(better.text, worse.text) for better, worse in item.preferences] == [("Gladly.", "No.")]
    assert item.display_order is None


def test_dialogues_of_one_first_turn_are_one_group_and_one_dialogue_one_prompt() -> None:
    rows = [hh(), hh(" Sure."), hh(start=START + " now"), hh(start="\n\nHuman: Bye")]
    prompts = [kept(published.read_hh(row)[0]).prompt for row in rows]
    assert prompts[0].group == prompts[1].group == prompts[2].group != prompts[3].group
    assert prompts[0].id == prompts[1].id
    assert len({prompt.id for prompt in prompts}) == 3


def test_a_speaker_who_goes_on_has_one_turn_and_quoted_names_are_text() -> None:
    start = "\n\nHuman: A\n\nAssistant: B  Human: no turn\n\nAssistant: C\n\nHuman: D"
    (judged,) = published.read_hh(hh(start=start))
    assert [turn.content for turn in judged.messages] == ["A", "B  Human: no turn\n\nC", "D"]


BAD_HH = [
    (hh(chosen=" "), "empty chosen answer"),
    (hh(rejected=""), "empty rejected answer"),
    (hh(other="\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: Help me"), "the two dialogues differ before the last answer"),
    (hh(" Same.", "Same. "), "the two answers are the same"),
    (hh(start="\n\nHuman: Hi\n\nAssistant: \n\nHuman: Well?"), "empty turn in the prompt"),
    (hh(start="\n\nHuman: Hi\n\nAssistant: A"), "the prompt does not end with the user's turn"),
    (hh(start=""), "the prompt does not end with the user's turn"),
    (hh(start="Hello. \n\nHuman: Hi"), "a dialogue does not begin with a Human or Assistant turn"),
    ({"chosen": START, "rejected": START}, "a dialogue does not end with an Assistant turn"),
    ({"chosen": hh()["chosen"]}, "no text under 'rejected'"),
    ({"chosen": 3, "rejected": 4}, "no text under 'chosen'"),
    (hh(chosen=" \ud800"), "'chosen' is not valid Unicode"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_HH)
def test_a_bad_dialogue_says_why(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow) as error:
        published.read_hh(row)
    assert str(error.value) == problem


@given(item=ranked(TRIMMED))
def test_hh_comes_back(item: Feedback) -> None:
    try:
        rows = published.write_hh(item, conversational=False)
    except Unsayable:
        assert not item.preferences
        return
    again = [kept(judged) for row in rows for judged in published.read_hh(row)]
    assert [row for one in again for row in published.write_hh(one, conversational=False)] == rows
    assert {one.messages for one in again} == {item.messages}


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (feedback(["q"], ["a", "b"], system="Be kind", ranking=Ranking(ranks=(1, 2))), "system's"),
        (feedback(["q"], ["a", "b\n\nHuman: c"], ranking=Ranking(ranks=(1, 2))), "marks a turn"),
        (feedback(["q"], ["a"], rating=Rating(value=1)), "a rating compares nothing"),
    ],
)
def test_what_hh_has_no_words_for_says_why(item: Feedback, problem: str) -> None:
    with pytest.raises(Unsayable, match=problem):
        published.write_hh(item, conversational=False)


def test_ultrafeedback_has_ratings_by_aspect_an_overall_one_and_a_critique() -> None:
    mark = {"Rating": "4", "Rationale": "Good."}
    marks = {"helpfulness": mark, "honesty": {"Rating": "N/A"}, "instruction_following": mark, "truthfulness": mark}
    completion = {
        "model": "alpaca-7b", "response": "An answer.", "annotations": marks, "overall_score": 7.5, "critique": "Fine.",
    }  # fmt: skip
    rows = published.read_ultrafeedback({"instruction": "Say", "completions": [completion], "source": "x"})
    items = [kept(judged) for judged in rows]
    ratings = [(item.rating.aspect, item.rating.value, item.rating.high) for item in items if item.rating]
    assert ratings == [
        ("helpfulness", 4, 5),
        ("instruction_following", 4, 5),
        ("truthfulness", 4, 5),
        ("overall", 7.5, 10),
    ]
    assert [item.comment.text for item in items if item.comment] == ["Fine."]
    assert {answer.sampler for item in items for answer in item.answers} == {"alpaca-7b"}
    with pytest.raises(BadRow, match="no completion that was judged"):
        published.read_ultrafeedback({"instruction": "Say", "completions": [{"model": "m", "response": "a"}]})
    with pytest.raises(BadRow, match="outside 1 to 10"):
        published.read_ultrafeedback({"instruction": "Say", "completions": [completion | {"overall_score": 85}]})


def test_helpsteer_has_five_ratings() -> None:
    row = {
        "prompt": "p",
        "response": "r",
        "helpfulness": 3,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 0,
    }
    ratings = [judged.what for judged in published.read_helpsteer(row) if isinstance(judged.what, Rating)]
    assert [(rating.aspect, rating.value, rating.low, rating.high) for rating in ratings] == [
        ("helpfulness", 3, 0, 4), ("correctness", 4, 0, 4), ("coherence", 4, 0, 4), ("complexity", 1, 0, 4),
        ("verbosity", 0, 0, 4),
    ]  # fmt: skip
    with pytest.raises(BadRow, match="no aspect"):
        published.read_helpsteer({"prompt": "p", "response": "r"})


@pytest.mark.parametrize(("strength", "ranks"), [(-3, (1, 2)), (-1, (1, 2)), (0, (1, 1)), (2, (2, 1))])
def test_helpsteer_has_preferences_with_a_strength(strength: int, ranks: tuple[int, int]) -> None:
    row = {
        "prompt": "p",
        "response_1": "a",
        "response_2": "b",
        "preference_strength": strength,
        "preference_statement": "So.",
    }
    choice, remark = (kept(judged) for judged in published.read_helpsteer(row))
    assert choice.ranking == Ranking(ranks=ranks, strength=abs(strength))
    assert (choice.display_order, [answer.text for answer in choice.answers]) == ((0, 1), ["a", "b"])
    assert remark.comment is not None
    with pytest.raises(BadRow, match="from -3 to 3"):
        published.read_helpsteer(row | {"preference_strength": 5})


def test_helpsteers_marked_turns_are_a_dialogue() -> None:
    prompt = "First\n<extra_id_1>Assistant\nReply\n<extra_id_1>User\nThen?"
    (judged, *_) = published.read_helpsteer({"prompt": prompt, "response": "r", "helpfulness": 1})
    assert judged.messages == (Message("user", "First"), Message("assistant", "Reply"), Message("user", "Then?"))


@pytest.mark.parametrize(("label", "better"), [(1, "a"), (0, "b")])
def test_shp_says_which_comment_had_more_votes(label: int, better: str) -> None:
    row = {
        "post_id": "x1",
        "history": "Post",
        "human_ref_A": "a",
        "human_ref_B": "b",
        "labels": label,
        "score_ratio": 2.5,
    }
    (judged,) = published.read_shp(row)
    item = kept(judged)
    assert item.preferences[0][0].text == better
    assert item.ranking is not None
    assert (item.group, item.ranking.strength) == ("x1", 2.5)
    with pytest.raises(BadRow, match="labels"):
        published.read_shp(row | {"labels": None})


def test_openais_comparisons_name_worker_and_policies() -> None:
    summaries = [{"text": " One.", "policy": "sup4", "note": ""}, {"text": " Two.", "policy": "ref"}]
    row = {"info": {"id": "t3", "post": "Long."}, "summaries": summaries, "choice": 1, "worker": "w9", "split": "train"}
    (judged,) = published.read_summaries(row)
    item = kept(judged)
    better, worse = item.preferences[0]
    assert (better.text, better.sampler, worse.sampler) == (" Two.", "ref", "sup4")
    assert (item.annotator, item.group, item.messages[0].content) == ("w9", "t3", "Long.")
    article = row | {"info": {"id": "t4", "post": None, "article": "News."}}
    assert published.read_summaries(article)[0].messages[0].content == "News."
    for changes in ({"choice": 2}, {"summaries": summaries[:1]}, {"summaries": None}, {"info": None}):
        with pytest.raises(BadRow):
            published.read_summaries(row | changes)


def arena(winner: str, *, content: Any = None) -> dict[str, Any]:
    def side(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": content or "Q"}, {"role": "assistant", "content": text}]

    return {
        "model_a": "m1", "model_b": "m2", "winner": winner, "judge": "judge-3",
        "conversation_a": side("one"), "conversation_b": side("two"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("winner", "ranks", "bad"),
    [
        ("model_a", (1, 2), None), ("model_b", (2, 1), None), ("tie", (1, 1), None), ("both_bad", (1, 1), True),
        ("tie (bothbad)", (1, 1), True),
    ],
)  # fmt: skip
def test_votes_of_the_arena(winner: str, ranks: tuple[int, int], bad: bool | None) -> None:
    (judged,) = published.read_arena(arena(winner))
    item = kept(judged)
    assert item.ranking is not None
    assert (item.ranking.ranks, item.ranking.all_bad) == (ranks, bad)
    assert [(answer.text, answer.sampler) for answer in item.answers] == [("one", "m1"), ("two", "m2")]
    assert (item.annotator, item.display_order) == ("judge-3", (0, 1))


def test_the_arenas_newer_turns_come_in_parts() -> None:
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "more"}]
    (judged,) = published.read_arena(arena("tie", content=parts))
    assert judged.messages == (Message("user", "Q\nmore"),)
    with pytest.raises(BadRow, match="a turn without text"):
        published.read_arena(arena("tie", content=[{"type": "image", "image": "..."}]))
    with pytest.raises(BadRow, match="no known vote"):
        published.read_arena(arena("model_c"))
    with pytest.raises(BadRow, match="differ before"):
        published.read_arena(arena("tie") | {"conversation_a": [{"role": "user", "content": "other"}]})


@given(item=ranked(most=2))
def test_a_vote_comes_back_ties_and_all(item: Feedback) -> None:
    (row,) = published.write_arena(item, conversational=True)
    (judged,) = published.read_arena(row)
    again = kept(judged)
    assert (again.messages, again.answers, again.ranking, again.annotator) == (
        item.messages, item.answers, item.ranking, item.annotator,
    )  # fmt: skip
    assert published.write_arena(again, conversational=True) == [row]


FIELDS = {"prompt": "Q", "response-1": "one", "response-2": "two"}


def test_argillas_first_generation_answers_by_user() -> None:
    values = {
        "ranking": {"value": [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]},
        "rating-response-1": {"value": 3},
        "why": {"value": "Because."},
        "best": {"value": "response-2"},
        "unclear": {"value": 4},
    }
    responses = [
        {"user_id": "u1", "status": "submitted", "values": values},
        {"user_id": "u2", "status": "draft", "values": values},
    ]
    items = [kept(judged) for judged in published.read_argilla({"fields": FIELDS, "responses": responses})]
    assert [item.kind for item in items] == ["ranking", "rating", "comment", "ranking"]
    assert {item.annotator for item in items} == {"u1"}
    assert [item.ranking.ranks for item in items if item.ranking] == [(2, 1), (2, 1)]
    rating = items[1].rating
    assert rating is not None
    assert (rating.value, rating.scale, items[1].answers[0].text) == (3, "points", "one")


def test_argillas_second_generation_answers_by_question() -> None:
    responses = {"quality": [{"value": 5, "user_id": "u1", "status": "submitted"}, {"value": 1, "user_id": "u2"}]}
    fields = {"instruction": [{"role": "user", "content": "Q"}], "completion": "one"}
    items = [kept(judged) for judged in published.read_argilla({"fields": fields, "responses": responses})]
    assert [(item.annotator, item.rating.value) for item in items if item.rating] == [("u1", 5), ("u2", 1)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "no object under 'fields'"),
        ({"fields": {"text": "x"}}, "no field that is a prompt"),
        ({"fields": {"prompt": "Q"}}, "no field that is an answer"),
        ({"fields": FIELDS, "responses": []}, "no response that was submitted"),
        ({"fields": FIELDS, "responses": [{"values": {"unclear": {"value": 4}}}]}, "no response that was submitted"),
    ],
)
def test_an_argilla_record_without_a_judgement_says_why(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        published.read_argilla(row)
