"""What actors note of their own work."""

import time
from collections.abc import Iterator

import pytest

from rlhf_ray.roles import busy
from rlhf_ray.roles.busy import Busy, Notes, Told, busy_of, noting


@noting("work", "fail", "stream")
class Worker(Notes):
    def work(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def fail(self) -> None:
        raise ValueError("no")

    def stream(self) -> Iterator[int]:
        yield 1
        time.sleep(0.02)
        yield 2

    def idle(self) -> None:
        pass


def test_it_notes_what_it_was_at_and_for_how_long_and_tells_it_once() -> None:
    worker = Worker()
    before = time.time()
    assert worker.work(0.02) == "done"
    worker.idle()
    told = worker.tell_busy()
    [(what, start, end)] = told.busy
    assert (what, before <= start < end <= told.now) == ("work", True)
    assert end - start >= 0.02
    assert worker.tell_busy().busy == []


def test_work_that_fails_was_work() -> None:
    worker = Worker()
    with pytest.raises(ValueError, match="no"):
        worker.fail()
    assert [piece.what for piece in worker.tell_busy().busy] == ["fail"]


def test_a_stream_is_one_piece_from_its_first_item_to_its_end() -> None:
    worker = Worker()
    assert list(worker.stream()) == [1, 2]
    [(what, start, end)] = worker.tell_busy().busy
    assert what == "stream"
    assert end - start >= 0.02


def test_it_keeps_its_last_pieces_only() -> None:
    worker = Worker()
    for _ in range(busy.KEPT + 5):
        worker.work(0.0)
    assert len(worker.tell_busy().busy) == busy.KEPT


class Asked:
    """An actor handle whose clock runs an hour ahead, and whose answer takes a while."""

    class tell_busy:
        @staticmethod
        def remote() -> Told:
            now = time.time()
            return Told(now + 3600, [Busy("score", now + 3590, now + 3595)])


def test_a_clock_that_runs_ahead_is_set_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "gather", lambda calls, **_: calls)
    [(what, start, end)] = busy_of({"scorer-0": Asked()}, deadline_s=1)["scorer-0"]
    assert what == "score"
    assert start == pytest.approx(time.time() - 10, abs=0.5)
    assert end - start == pytest.approx(5)
