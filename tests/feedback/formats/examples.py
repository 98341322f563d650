"""Feedback to write in formats and read again; strategies that draw it."""

from typing import Any

from hypothesis import strategies as st

from rlhf_ray.feedback.schema import Answer, Comment, Feedback, Ranking, Rating, competition_ranks, names_of
from rlhf_ray.types import Message

WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(lambda text: text.strip())
TRIMMED = WORDS.map(str.strip).filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)


def feedback(turns: list[str], answers: list[str], *, system: str | None = None, **what: Any) -> Feedback:
    """Turns by the user and the assistant in turn, the user's first and last."""
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    if system is not None:
        messages = (Message("system", system), *messages)
    prompt_id, group = names_of(messages)
    shown = tuple(Answer(text=text, sampler="them") for text in answers)
    return Feedback(messages=messages, prompt_id=prompt_id, group=group, answers=shown, annotator="ann", **what)


@st.composite
def ranked(draw: st.DrawFn, text: st.SearchStrategy[str] = WORDS, *, most: int = 4, dialogues: bool = True) -> Feedback:
    """A ranking of different answers, ties among them."""
    turns = draw(st.lists(text, min_size=1, max_size=3 if dialogues else 1).filter(lambda turns: len(turns) % 2))
    answers = draw(st.lists(text, min_size=2, max_size=most, unique=True))
    scores = draw(st.lists(st.integers(0, 2), min_size=len(answers), max_size=len(answers)))
    ranks = competition_ranks([float(score) for score in scores])
    all_bad = True if len(set(ranks)) == 1 and draw(st.booleans()) else None
    return feedback(turns, answers, ranking=Ranking(ranks=ranks, all_bad=all_bad))


@st.composite
def anything(draw: st.DrawFn) -> Feedback:
    """Of any kind."""
    kind = draw(st.sampled_from(["ranking", "stars", "thumb", "points", "comment"]))
    if kind == "ranking":
        return draw(ranked())
    turns, answers = draw(st.lists(WORDS, min_size=1, max_size=1)), [draw(WORDS)]
    if kind == "comment":
        return feedback(turns, answers, comment=Comment(text=draw(WORDS)))
    value = draw(st.integers(0, 1) if kind == "thumb" else st.integers(1, 5))
    return feedback(turns, answers, rating=Rating(value=float(value), scale=kind))
