"""The labelling queue: who is shown what, for how long, and what becomes of it."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rlhf_ray.errors import FeedbackError
from rlhf_ray.feedback import tasks
from rlhf_ray.feedback.annotators import annotators
from rlhf_ray.feedback.schema import Feedback, NextBy, Ranking, Rating, names_of
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.tasks import Gold, Held, Task, TaskTaken, UnknownTask
from rlhf_ray.types import Message

LEASE = timedelta(minutes=30)


class Clock:
    """What time it is, as a test says."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def wait(self, minutes: float) -> None:
        self.now += timedelta(minutes=minutes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tasks, "now", clock)
    return clock


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    with FeedbackStore(url) as opened:
        yield opened


def task(name: str = "t1", answers: int = 2, **more: Any) -> Task:
    messages = (Message("user", f"Question {name}?"),)
    prompt_id, group = names_of(messages)
    given = [{"text": f"{name} answer {n}", "sampler": f"policy-{n}", "policy_version": n} for n in range(answers)]
    return tasks.parse_task(
        {"id": name, "messages": messages, "prompt_id": prompt_id, "group": group, "answers": given} | more
    )


def ranked(held: Held, annotator: str, *ranks: int, seconds: float | None = None) -> tuple[Feedback, ...]:
    of = held.task
    return (
        Feedback(
            messages=of.messages,
            prompt_id=of.prompt_id,
            group=of.group,
            answers=of.answers,
            ranking=Ranking(ranks=ranks or (1, 2)),
            annotator=annotator,
            display_order=held.order,
            seconds=seconds,
        ),
    )


def show(store: FeedbackStore, annotator: str, by: NextBy = "random") -> Held | None:
    return tasks.next_task(store, annotator, by=by, lease=LEASE)


def shown(store: FeedbackStore, annotator: str, by: NextBy = "random") -> Held:
    held = show(store, annotator, by)
    assert held is not None
    return held


def answer(store: FeedbackStore, held: Held, annotator: str, *ranks: int) -> tuple[str, ...]:
    said = ranked(held, annotator, *ranks)
    return tasks.answer_task(store, held.task.id, annotator, said, said={"ranking": list(ranks)})


def test_a_task_is_shown_to_as_many_as_are_wanted_and_to_nobody_twice(store: FeedbackStore, clock: Clock) -> None:
    tasks.add_tasks(store, [task(overlap=2)])
    first = shown(store, "ann")
    assert show(store, "bea") is not None
    assert show(store, "eve") is None
    answer(store, first, "ann")
    assert show(store, "ann") is None
    clock.wait(31)  # bea has gone home
    last = shown(store, "eve")
    answer(store, last, "eve")
    assert [item.annotator for item in store.iter()] == ["ann", "eve"]


def test_who_asks_again_gets_the_same_task_in_the_same_order(store: FeedbackStore, clock: Clock) -> None:
    tasks.add_tasks(store, [task(f"t{n}", answers=8) for n in range(5)])
    first = shown(store, "ann")
    clock.wait(20)
    second = shown(store, "ann")
    assert (second.task.id, second.order, second.since) == (first.task.id, first.order, first.since)
    assert second.until == clock.now + LEASE
    assert second.seconds == 20 * 60
    clock.wait(31)
    late = show(store, "ann")
    assert late is not None
    if late.task.id == first.task.id:
        assert late.order == first.order


def test_orders_are_drawn_for_each_annotator_and_every_order_comes_up(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task(answers=3, overlap=100)])
    orders = Counter(shown(store, f"ann-{n}").order for n in range(100))
    assert len(orders) == 6
    assert max(orders.values()) < 45


def test_an_answer_keeps_the_order_and_may_be_sent_again(store: FeedbackStore, clock: Clock) -> None:
    tasks.add_tasks(store, [task(answers=3)])
    held = shown(store, "ann")
    ids = answer(store, held, "ann", 1, 2, 3)
    assert answer(store, held, "ann", 1, 2, 3) == ids
    (row,) = store.iter()
    assert (row.id, row.display_order) == (ids[0], held.order)
    with pytest.raises(TaskTaken, match="you have answered this task: undo that first"):
        answer(store, held, "ann", 3, 2, 1)
    assert store.count() == 1


def test_a_late_answer_is_taken_while_nobody_else_has_the_task(store: FeedbackStore, clock: Clock) -> None:
    tasks.add_tasks(store, [task("t1"), task("t2")])
    first, second = shown(store, "ann"), shown(store, "bea")
    assert first.task.id != second.task.id
    clock.wait(31)
    answer(store, first, "ann")
    other = shown(store, "eve")
    assert other.task.id == second.task.id
    with pytest.raises(TaskTaken, match="others have this task now"):
        answer(store, second, "bea")
    answer(store, other, "eve")
    assert [item.annotator for item in store.iter()] == ["ann", "eve"]


def test_undo_shows_the_task_again_and_leaves_what_was_said_out_of_snapshots(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task("t1"), task("t2")])
    held = shown(store, "ann")
    (wrong,) = answer(store, held, "ann", 2, 1)
    again = tasks.undo_task(store, held.task.id, "ann", lease=LEASE)
    assert (again.task, again.order, again.state) == (held.task, held.order, "shown")
    assert tasks.undo_task(store, held.task.id, "ann", lease=LEASE).order == held.order  # sent twice
    assert shown(store, "ann").task.id == held.task.id
    (right,) = answer(store, again, "ann", 1, 2)
    assert [item.id for item in store.iter()] == [wrong, right]
    assert [item.id for item in store.read(store.freeze("now").id)] == [right]


def test_a_skip_is_for_good_until_it_is_undone(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task()])
    held = shown(store, "ann")
    tasks.skip_task(store, "t1", "ann", reason="not my language")
    tasks.skip_task(store, "t1", "ann", reason="not my language")
    assert show(store, "ann") is None
    other = shown(store, "bea")  # whose place is free
    with pytest.raises(TaskTaken, match="others have this task"):
        tasks.undo_task(store, "t1", "ann", lease=LEASE)
    tasks.skip_task(store, other.task.id, "bea", reason="nor mine")
    assert tasks.undo_task(store, "t1", "ann", lease=LEASE).order == held.order
    answer(store, held, "ann")
    with pytest.raises(TaskTaken, match="you have answered"):
        tasks.skip_task(store, "t1", "ann", reason="after all")


def test_what_was_not_shown_cannot_be_judged(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task()])
    held = shown(store, "ann")
    for name, annotator in (("t9", "ann"), ("t1", "bea")):
        with pytest.raises(UnknownTask, match="ask for the next one"):
            tasks.held_task(store, name, annotator)
        with pytest.raises(UnknownTask):
            tasks.answer_task(store, name, annotator, ranked(held, annotator), said=1)
        with pytest.raises(UnknownTask):
            tasks.skip_task(store, name, annotator, reason="x")
        with pytest.raises(UnknownTask):
            tasks.undo_task(store, name, annotator, lease=LEASE)
    assert store.count() == 0


def test_the_newest_policy_or_what_models_disagree_on_comes_first(store: FeedbackStore) -> None:
    def of_version(name: str, version: int | None, priority: float | None) -> Task:
        given = [{"text": text, "sampler": "ppo", "policy_version": version} for text in ("a", "b")]
        return tasks.parse_task(task(name, priority=priority).model_dump(exclude_none=True) | {"answers": given})

    plan = [("old", 1, 0.5), ("new", 7, 0.1), ("none", None, None), ("torn", 3, 2.0)]
    tasks.add_tasks(store, [of_version(*one) for one in plan])

    def walk(annotator: str, by: NextBy) -> list[str]:
        met = []
        while held := show(store, annotator, by):
            met.append(held.task.id)
            tasks.skip_task(store, held.task.id, annotator, reason="walk")
        return met

    assert walk("ann", "newest") == ["new", "torn", "old", "none"]
    assert walk("bea", "disagreement") == ["torn", "old", "new", "none"]
    assert walk("eve", "random") == walk("kim", "random")  # so that what is begun gets finished


def test_progress_and_history_are_ones_own(store: FeedbackStore, clock: Clock) -> None:
    tasks.add_tasks(store, [task(f"t{n}", overlap=2) for n in range(4)])
    done = []
    for _ in range(2):
        held = shown(store, "ann")
        answer(store, held, "ann")
        done.append(held.task.id)
    skipped = shown(store, "ann").task.id
    tasks.skip_task(store, skipped, "ann", reason="unclear")
    held = shown(store, "bea")
    answer(store, held, "bea")
    assert tasks.progress(store, "ann") == tasks.Progress(answered=2, skipped=1, left=1, tasks=4, complete=1)
    assert tasks.progress(store, "bea") == tasks.Progress(answered=1, skipped=0, left=3, tasks=4, complete=1)
    past = tasks.history(store, "ann")
    assert [(one.task.id, one.state, one.reason) for one in past] == [
        (skipped, "skipped", "unclear"),
        (done[1], "answered", None),
        (done[0], "answered", None),
    ]
    assert [one.task.id for one in tasks.history(store, "ann", before=past[0].cursor, limit=1)] == [done[1]]
    tasks.undo_task(store, done[0], "ann", lease=LEASE)
    assert [one.task.id for one in tasks.history(store, "ann")] == [skipped, done[1]]


def test_tasks_are_added_once_and_all_or_none(store: FeedbackStore) -> None:
    assert tasks.add_tasks(store, [task("t1"), task("t2")]) == 2
    assert tasks.add_tasks(store, [task("t2", priority=0.2), task("t3")]) == 1
    with pytest.raises(FeedbackError, match="task id 't1' is taken by another task"):
        tasks.add_tasks(store, [task("t4"), task("t1", answers=3)])
    with pytest.raises(FeedbackError, match="task id 't5' is taken"):
        tasks.add_tasks(store, [task("t5"), task("t5", answers=3)])
    assert tasks.progress(store, "ann").tasks == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": []}, "0 answers: give 1 to 16"),
        ({"overlap": 0}, "overlap: Input should be greater than or equal to 1, got 0"),
        ({"messages": [Message("assistant", "Hi")]}, "the prompt ends with the assistant's turn"),
        ({"gold": {"ranks": [1, 2, 3]}}, "3 gold ranks for 2 answers"),
        ({"gold": {"ranks": [1, 3]}}, r"gold: ranks \[1, 3\] leave places out"),
        ({"gold": {"at_least": 4}}, "gold of one answer is a range of ratings"),
        ({"gold": {}}, "gold is either ranks, or at_least and at_most"),
        ({"answers": [{"text": "a", "sampler": "b"}], "asks": ["ranking"]}, "one answer cannot be ranked"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FeedbackError, match=message):
        tasks.parse_task(task().model_dump() | changes)


def test_gold_is_counted_by_annotator_and_undone_answers_are_not(store: FeedbackStore) -> None:
    tasks.add_tasks(
        store,
        [task("g1", gold={"ranks": [1, 2]}, overlap=2), task("g2", answers=3, gold={"ranks": [1, 2, 2]}, overlap=2)],
    )
    said = {("ann", "g1"): (1, 2), ("ann", "g2"): (1, 3, 2), ("bea", "g1"): (2, 1), ("bea", "g2"): (1, 1, 3)}
    for name in ("ann", "bea"):
        while held := show(store, name):
            answer(store, held, name, *said[name, held.task.id])
    assert tasks.gold_marks(store) == {"ann": (2, 2), "bea": (0, 2)}
    tasks.undo_task(store, "g1", "bea", lease=LEASE)
    assert tasks.gold_marks(store)["bea"] == (0, 1)
    assert [(one.name, one.gold_right, one.gold_asked) for one in annotators(store)] == [("ann", 2, 2), ("bea", 0, 1)]


@pytest.mark.parametrize(("stars", "right"), [(1, True), (2, True), (2.5, False)])
def test_gold_of_one_answer_is_a_range_of_ratings(store: FeedbackStore, stars: float, right: bool) -> None:
    tasks.add_tasks(store, [task("g", answers=1, gold=Gold(at_most=2).model_dump(exclude_none=True))])
    held = shown(store, "ann")
    said = Feedback(
        messages=held.task.messages,
        prompt_id="p",
        group="p",
        answers=held.task.answers,
        rating=Rating(value=stars),
        annotator="ann",
    )
    tasks.answer_task(store, "g", "ann", [said], said=stars)
    assert tasks.gold_marks(store) == {"ann": (int(right), 1)}


def test_guidelines_are_the_last_that_were_set(store: FeedbackStore) -> None:
    assert tasks.guide(store) is None
    tasks.set_guide(store, "Be kind.", by="kim")
    tasks.set_guide(store, "Be true.", by="kim")
    assert tasks.guide(store) == "Be true."


def test_no_task_has_more_people_than_wanted_however_they_come_and_go(store: FeedbackStore, clock: Clock) -> None:
    """400 random steps of five people: never more than two answers to a task, never two of one person."""
    tasks.add_tasks(store, [task(f"t{n}", overlap=2) for n in range(6)])
    rng = random.Random(3)
    for _ in range(400):
        who = rng.choice(["ann", "bea", "eve", "kim", "zoe"])
        step = rng.random()
        try:
            if step < 0.5 and (held := show(store, who)):
                if rng.random() < 0.7:
                    answer(store, held, who)
            elif step < 0.6 and (past := tasks.history(store, who)):
                tasks.undo_task(store, rng.choice(past).task.id, who, lease=LEASE)
            elif step < 0.7 and (held := show(store, who)):
                tasks.skip_task(store, held.task.id, who, reason="x")
            elif step < 0.8:
                answer(store, tasks.held_task(store, f"t{rng.randrange(6)}", who), who)
            else:
                clock.wait(rng.choice([1, 10, 31]))
        except (TaskTaken, UnknownTask):
            pass
        counted = Counter()
        out = store.excluded().feedback
        for item in store.iter():
            if item.id not in out:
                counted[item.prompt_id, item.annotator] += 1
        assert all(times == 1 for times in counted.values())
        assert all(times <= 2 for times in Counter(prompt for prompt, _ in counted).values())
    assert len(counted) >= 8


def test_two_who_ask_at_once_do_not_share_a_place(store: FeedbackStore) -> None:
    tasks.add_tasks(store, [task(f"t{n}") for n in range(20)])
    met: list[str] = []

    def work(name: str) -> None:
        while held := show(store, name):
            answer(store, held, name)
            met.append(held.task.id)

    people = [threading.Thread(target=work, args=(f"ann-{n}",)) for n in range(4)]
    for one in people:
        one.start()
    for one in people:
        one.join(60)
    assert sorted(met) == sorted(f"t{n}" for n in range(20))
