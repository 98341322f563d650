"""While the gate is closed nobody is inside, and nobody waits for ever."""

import asyncio

import pytest

from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.gate import Gate


async def stay(gate: Gate, leave: asyncio.Event, wait_s: float = 5) -> None:
    async with gate.passing(wait_s):
        await leave.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_closing_waits_until_the_last_one_inside_has_left() -> None:
    async def scenario() -> None:
        gate, leave, events = Gate(), asyncio.Event(), []
        guest = asyncio.create_task(stay(gate, leave))
        await settle()

        async def close() -> None:
            async with gate.closed(5):
                events.append(gate.inside)

        closing = asyncio.create_task(close())
        await settle()
        assert gate.inside == 1
        assert events == []
        leave.set()
        await asyncio.gather(guest, closing)
        assert events == [0]

    asyncio.run(scenario())


def test_a_newcomer_waits_while_it_is_closed_and_passes_when_it_opens() -> None:
    async def scenario() -> None:
        gate, leave = Gate(), asyncio.Event()
        async with gate.closed(5):
            newcomer = asyncio.create_task(stay(gate, leave))
            await settle()
            assert gate.inside == 0
        await settle()
        assert gate.inside == 1
        leave.set()
        await newcomer

    asyncio.run(scenario())


def test_a_newcomer_is_refused_with_retry_after_once_its_wait_is_over() -> None:
    async def scenario() -> None:
        gate = Gate()
        async with gate.closed(5):
            with pytest.raises(ApiError, match="being loaded") as refusal:
                await stay(gate, asyncio.Event(), wait_s=0.01)
        assert refusal.value.status == 503
        assert refusal.value.retry_after
        assert gate.inside == 0

    asyncio.run(scenario())


def test_somebody_who_does_not_leave_makes_closing_fail_and_it_opens_again() -> None:
    async def scenario() -> None:
        gate, leave = Gate(), asyncio.Event()
        guest = asyncio.create_task(stay(gate, leave))
        await settle()
        with pytest.raises(TimeoutError):
            async with gate.closed(0.01):
                pytest.fail("somebody is still inside")
        assert gate.is_open
        leave.set()
        await guest

    asyncio.run(scenario())


def test_one_that_fails_inside_has_left() -> None:
    async def scenario() -> None:
        gate = Gate()
        with pytest.raises(KeyError):
            async with gate.passing(1):
                raise KeyError
        async with gate.closed(0.1):
            assert gate.inside == 0

    asyncio.run(scenario())


def test_shut_for_good_it_refuses_those_who_wait_and_those_who_come() -> None:
    async def scenario() -> None:
        gate = Gate()
        async with gate.closed(1):
            waiting = asyncio.create_task(stay(gate, asyncio.Event()))
            await settle()
            gate.shut("its weights are in doubt")
        with pytest.raises(ApiError, match="replaced"):
            await waiting
        with pytest.raises(ApiError, match="replaced"):
            await stay(gate, asyncio.Event())

    asyncio.run(scenario())
