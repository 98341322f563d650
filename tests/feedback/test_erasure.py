"""Erasure: the words are gone from the file, and it is said which snapshots had held them."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from rlhf_ray.errors import DataError, FeedbackError
from rlhf_ray.feedback import tasks
from rlhf_ray.feedback.erasure import Erased
from rlhf_ray.feedback.schema import Comment, Feedback
from rlhf_ray.feedback.store import FeedbackStore
from tests.feedback.places import holds, refuses
from tests.feedback.test_requests import make_completion
from tests.feedback.test_store import make_feedback
from tests.feedback.test_tasks import answer, shown, task

WORDS = 'my "secret" street\nnumber \\ 7'
"""With all that JSON writes otherwise."""


def comment(text: str, annotator: str) -> Feedback:
    return make_feedback("p9", rating=None, comment=Comment(text=text), annotator=annotator)


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    with FeedbackStore(url) as opened:
        opened.add([make_feedback("p1", annotator="ann"), make_feedback("p2", annotator="bea")])
        opened.freeze("early")
        opened.add([comment(f"I live at {WORDS}.", "ann"), comment("Fine.", "bea")])
        opened.freeze("late")
        yield opened


def test_a_text_is_gone_from_every_table_and_from_the_file(store: FeedbackStore) -> None:
    store.commit([], [make_completion(answers=(f"At {WORDS}?", "Who knows?"))])
    tasks.add_tasks(store, [task("t1"), task("t2", answers=1, messages=[{"role": "user", "content": WORDS}])])
    for _ in range(2):
        answer_one(store)
    assert store.erase(text=WORDS, reason="asked", by="kim", dry_run=True).feedback == 2
    assert store.count() == 6
    erased = store.erase(text=WORDS, reason="asked", by="kim")
    assert erased == Erased(feedback=2, completions=1, tasks=1, steps=2, snapshots=("late",))
    assert store.count() == 4
    assert not holds(store, b"secret")


def answer_one(store: FeedbackStore) -> None:
    held = shown(store, "ann")
    if len(held.task.answers) == 2:
        answer(store, held, "ann")
    else:
        said = make_feedback("t2", messages=held.task.messages, answers=held.task.answers, annotator="ann")
        tasks.answer_task(store, held.task.id, "ann", [said], said=1)


def test_a_task_can_be_undone_after_some_of_what_was_said_of_it_was_erased(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task("t1")])
    held = shown(store, "ann")
    said = [make_feedback("t1", annotator="ann"), comment(WORDS, "ann")]
    tasks.answer_task(store, "t1", "ann", said, said=1)
    store.erase(text=WORDS, reason="asked", by="kim")
    again = tasks.undo_task(store, "t1", "ann", lease=timedelta(minutes=5))
    assert (again.state, again.order) == ("shown", held.order)
    assert store.excluded().feedback == {said[0].id}


def test_an_annotator_is_forgotten_by_name(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task("t1")])
    held = shown(store, "ann")
    tasks.skip_task(store, held.task.id, "ann", reason="I, ann, am tired")
    store.flag("annotator", ["ann"], reason="x", by="kim")
    erased = store.erase(annotator="ann", reason="asked", by="kim")
    assert erased == Erased(feedback=2, completions=0, tasks=0, steps=2, snapshots=("early", "late"))
    assert {item.annotator for item in store.iter()} == {"bea"}
    assert store.excluded().annotators == frozenset()
    assert not holds(store, b'"annotator":"ann"')
    assert not holds(store, b"I, ann, am tired")
    assert store.erase(annotator="ann", reason="again", by="kim").feedback == 0


def test_a_snapshot_that_lost_rows_says_so_and_what_is_left_can_be_frozen(store: FeedbackStore) -> None:
    store.erase(text=WORDS, reason="asked", by="kim")
    assert len(list(store.read("early"))) == 2
    with pytest.raises(DataError, match=r"snapshot 'late' in .* lost rows to an erasure on 20.*--of late"):
        list(store.read("late"))
    assert [item.annotator for item in store.read(store.freeze("left", of="late").id)] == ["ann", "bea", "bea"]


def test_rows_are_as_safe_after_an_erasure_as_before(store: FeedbackStore) -> None:
    store.erase(text=WORDS, reason="asked", by="kim")
    refuses(store, "DELETE FROM feedback")
    refuses(store, "UPDATE feedback SET kind = 'rating'")
    assert store.count() == 3


def test_an_erasure_that_fails_leaves_all_as_it_was(store: FeedbackStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FeedbackError("no")

    monkeypatch.setattr("rlhf_ray.feedback.erasure.iso", fail)
    with pytest.raises(FeedbackError, match="no"):
        store.erase(text=WORDS, reason="asked", by="kim")
    assert len(list(store.read("late"))) == 4
    refuses(store, "DELETE FROM feedback")


@pytest.mark.parametrize("what", [{}, {"annotator": "a", "text": "long enough"}, {"text": "ab "}])
def test_what_is_not_clear_is_refused(store: FeedbackStore, what: dict[str, str]) -> None:
    with pytest.raises(FeedbackError, match=r"what to erase|fewer than 4"):
        store.erase(**what, reason="x", by="kim")
