import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.serving.batches import Batches, in_thread
from rlhf_ray.serving.errors import ApiError


class Doubler:
    """Doubles numbers, notes its batches, waits where it is told to."""

    def __init__(self, *, hold: threading.Event | None = None) -> None:
        self.batches: list[list[int]] = []
        self._hold = hold

    def __call__(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        if self._hold:
            assert self._hold.wait(5)
        if 13 in items:
            raise ZeroDivisionError("thirteen")
        return [ValueError("seven") if item == 7 else 2 * item for item in items]


def make_batches(work: Callable[[list[int]], Sequence[int | Exception]], **changes: Any) -> Batches[int, int]:
    return Batches(
        in_thread(work, "doubler"), **({"name": "the doubler", "most": 4, "limit": 100, "deadline_s": 5} | changes)
    )


async def started(work: Doubler) -> None:
    while not work.batches:
        await asyncio.sleep(0.001)


async def gather(batches: Batches[int, int], *items: int) -> list[Any]:
    return await asyncio.gather(*map(batches.submit, items), return_exceptions=True)


def test_what_waits_while_one_batch_is_done_makes_up_the_next() -> None:
    async def run() -> None:
        hold = threading.Event()
        work = Doubler(hold=hold)
        batches = make_batches(work)
        first = asyncio.create_task(batches.submit(1))
        await started(work)
        rest = [asyncio.create_task(batches.submit(item)) for item in (2, 3, 4, 5, 6)]
        await asyncio.sleep(0)
        hold.set()
        assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10, 12]
        assert work.batches == [[1], [2, 3, 4, 5], [6]]
        await batches.close()

    asyncio.run(run())


def test_a_lone_item_does_not_wait_for_company() -> None:
    async def run() -> float:
        batches = make_batches(Doubler())
        await batches.submit(1)
        start = time.perf_counter()
        await batches.submit(2)
        return time.perf_counter() - start

    assert asyncio.run(run()) < 0.5


def test_an_item_that_breaks_the_work_is_refused_and_the_others_are_done() -> None:
    async def run() -> tuple[list[Any], int]:
        batches = make_batches(Doubler())
        return await gather(batches, 1, 13, 7, 3), batches.failures

    (one, thirteen, seven, three), failures = asyncio.run(run())
    assert (one, three) == (2, 6)
    assert isinstance(thirteen, ZeroDivisionError)
    assert isinstance(seven, ValueError)
    assert failures == 2  # the batch, and the item alone


def test_trouble_of_the_machine_is_told_to_all_at_once() -> None:
    calls = 0

    def fail(_: list[int]) -> list[int | Exception]:
        nonlocal calls
        calls += 1
        raise InfrastructureError("the disk is full")

    outcomes = asyncio.run(gather(make_batches(fail), 1, 2, 3))
    assert [str(outcome) for outcome in outcomes] == ["the disk is full"] * 3
    assert calls == 1


def test_a_full_queue_refuses_with_when_to_come_again() -> None:
    async def run() -> ApiError:
        hold = threading.Event()
        work = Doubler(hold=hold)
        batches = make_batches(work, limit=2)
        tasks = [asyncio.create_task(batches.submit(1))]
        await started(work)
        tasks += [asyncio.create_task(batches.submit(item)) for item in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too much to do") as refusal:
            await batches.submit(4)
        hold.set()
        assert await asyncio.gather(*tasks) == [2, 4, 6]
        return refusal.value

    refusal = asyncio.run(run())
    assert (refusal.status, refusal.retry_after) == (503, 1)


def test_one_item_heavier_than_the_queue_is_done_alone() -> None:
    assert asyncio.run(make_batches(Doubler(), limit=2).submit(1, weight=50)) == 2


def test_who_waits_too_long_is_told_and_what_nobody_waits_for_is_left_out() -> None:
    async def run() -> list[list[int]]:
        hold = threading.Event()
        work = Doubler(hold=hold)
        batches = make_batches(work, deadline_s=0.05)
        outcomes = asyncio.create_task(gather(batches, 1))
        await started(work)
        outcomes = asyncio.gather(outcomes, gather(batches, 2))
        for outcome in (outcome for some in await outcomes for outcome in some):
            assert isinstance(outcome, ApiError)
            assert (outcome.status, outcome.code) == (503, "deadline_exceeded")
        hold.set()
        await batches.close()
        return work.batches

    assert asyncio.run(run()) == [[1]]


def test_closing_finishes_what_waits_and_takes_nothing_more() -> None:
    async def run() -> None:
        batches = make_batches(Doubler())
        waiting = [asyncio.create_task(batches.submit(item)) for item in (1, 2)]
        await asyncio.sleep(0)
        await batches.close()
        assert await asyncio.gather(*waiting) == [2, 4]
        with pytest.raises(ApiError, match="stopping"):
            await batches.submit(3)

    asyncio.run(run())


def test_a_short_wait_fills_batches() -> None:
    async def run() -> list[list[int]]:
        work = Doubler()
        batches = make_batches(work, linger_s=0.05)
        late = asyncio.create_task(batches.submit(1))
        await asyncio.sleep(0.01)
        await asyncio.gather(late, batches.submit(2))
        return work.batches

    assert asyncio.run(run()) == [[1, 2]]


@pytest.mark.parametrize("steps", range(8))
def test_what_comes_while_a_lane_ends_is_done_too(steps: int) -> None:
    async def run() -> list[int]:
        batches: Batches[int, int] = Batches(double, name="the doubler", most=4, limit=100, deadline_s=0.5)

        async def later() -> int:
            for _ in range(steps):
                await asyncio.sleep(0)
            return await batches.submit(2)

        return await asyncio.gather(batches.submit(1), later())

    async def double(items: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [2 * item for item in items]

    assert asyncio.run(run()) == [2, 4]


def test_so_many_lanes_so_many_batches_at_a_time() -> None:
    async def run() -> tuple[list[list[int]], int]:
        batches, under_way, most = [], 0, 0

        async def work(items: list[int]) -> list[int]:
            nonlocal under_way, most
            batches.append(items)
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            return items

        lanes: Batches[int, int] = Batches(work, name="lanes", most=4, limit=100, deadline_s=5, lanes=3)
        assert await asyncio.gather(*map(lanes.submit, range(20))) == list(range(20))
        await lanes.close()
        return batches, most

    batches, most = asyncio.run(run())
    assert most == 3
    assert [item for batch in batches for item in batch] == list(range(20))


def test_a_refusal_of_the_whole_batch_is_told_to_all_and_not_asked_for_again() -> None:
    calls = 0

    async def refuse(_: list[int]) -> list[int]:
        nonlocal calls
        calls += 1
        raise ApiError(503, "restarting", retry_after=5)

    outcomes = asyncio.run(gather(Batches(refuse, name="x", most=4, limit=100, deadline_s=5), 1, 2, 3))
    assert [outcome.status for outcome in outcomes] == [503] * 3
    assert calls == 1
