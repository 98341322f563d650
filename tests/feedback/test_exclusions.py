"""Flags on annotators and on single judgements, and the snapshots that leave them out."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Feedback, Ranking
from rlhf_ray.feedback.store import FeedbackStore
from tests.feedback.formats.examples import feedback
from tests.feedback.places import refuses


def said(number: int, annotator: str) -> Feedback:
    item = feedback([f"q{number}"], ["a", "b"], ranking=Ranking(ranks=(1, 2)))
    return item.model_copy(update={"annotator": annotator, "id": f"f{number}"})


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    with FeedbackStore(url) as opened:
        opened.add([said(n, "bea" if n % 3 == 0 else "ann") for n in range(9)])
        yield opened


def ids(store: FeedbackStore, snapshot: str) -> list[str]:
    return [item.id for item in store.read(snapshot)]


def test_the_same_snapshot_less_somebodys_rows_and_back(store: FeedbackStore) -> None:
    whole = store.freeze("whole")
    store.add([said(20, "ann")])
    assert store.flag("annotator", ["bea"], reason="answers in two seconds", by="kim") == 3
    less = store.freeze("less", of="whole")
    assert (whole.rows, less.rows) == (9, 6)
    assert ids(store, "less") == [id for id in ids(store, "whole") if id not in ("f0", "f3", "f6")]
    assert store.freeze().rows == 7
    assert ids(store, "whole") == [f"f{n}" for n in range(9)]  # what was frozen stays
    assert store.flag("annotator", ["bea"], out=False, reason="was on a phone", by="kim") == 3
    assert store.freeze(of="whole").sha256 == whole.sha256


def test_one_judgement_is_left_out(store: FeedbackStore) -> None:
    store.flag("feedback", ["f1", "f2"], reason="test clicks", by="kim")
    assert ids(store, store.freeze().id) == ["f0", *(f"f{n}" for n in range(3, 9))]
    assert store.excluded().feedback == {"f1", "f2"}
    assert store.get("f1") is not None  # nothing is removed


def test_who_is_not_there_is_named_and_nothing_is_flagged(store: FeedbackStore) -> None:
    with pytest.raises(DataError, match="holds nothing of annotator 'eve'"):
        store.flag("annotator", ["bea", "eve"], reason="x", by="kim")
    assert store.excluded().annotators == frozenset()
    with pytest.raises(DataError, match="no snapshot 'none'"):
        store.freeze(of="none")


def test_a_snapshot_of_nothing_is_refused_with_the_way_out(store: FeedbackStore) -> None:
    store.flag("annotator", ["ann", "bea"], reason="x", by="kim")
    with pytest.raises(DataError, match="take an exclusion back"):
        store.freeze()


def test_flags_are_kept_for_good(store: FeedbackStore) -> None:
    store.flag("annotator", ["bea"], reason="x", by="kim")
    refuses(store, "DELETE FROM exclusions")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_store_of_before_is_brought_up_to_date_and_read_as_it_is(tmp_path: Path, version: int) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript((Path(__file__).parent / f"store_v{version}.sql").read_text(encoding="utf-8"))
    connection.close()
    with FeedbackStore(path, read_only=True) as store:
        assert store.excluded().annotators == frozenset()
        rows = store.count()
    with FeedbackStore(path) as store:
        assert [snapshot.rows for snapshot in store.snapshots()] == [rows]
        (snapshot,) = store.snapshots()
        assert len(list(store.read(snapshot.id))) == rows
        store.flag("feedback", [next(store.iter()).id], reason="x", by="kim")
        assert store.freeze().rows < rows
