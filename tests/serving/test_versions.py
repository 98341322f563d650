"""The registry's word reaches the replicas one at a time, and a failure is written there before anybody goes back."""

import asyncio
from typing import cast

import pytest

from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.versions import Versions
from tests.serving.engines import FakeRegistry
from tests.serving.test_turns import HandClock

A, B = "replica-a", "replica-b"


def make_versions(*numbers: int, promoted: tuple[int, ...] = (1,)) -> tuple[Versions, FakeRegistry, HandClock]:
    registry = FakeRegistry(*(numbers or (1, 2)), promoted=promoted)
    clock = HandClock()
    return Versions(cast(Registry, registry), lease_s=60, clock=clock), registry, clock


def number(version: object) -> int | None:
    return None if version is None else version.number  # type: ignore[attr-defined, no-any-return]


async def settle(versions: Versions, holding: int = 1) -> None:
    for _ in range(3):
        for replica in (A, B):
            assert await versions.turn(replica, holding) is None
        versions.clock.now += 5  # type: ignore[attr-defined]


def test_a_promotion_is_seen_within_a_second_and_reaches_one_replica_after_the_other() -> None:
    async def scenario() -> None:
        versions, registry, clock = make_versions()
        await settle(versions)
        registry.promote(2)
        clock.now += 1
        assert number(await versions.turn(A, 1)) == 2
        assert await versions.turn(B, 1) is None
        await versions.report(A, 2, tried=2, error=None)
        assert number(await versions.turn(B, 1)) == 2
        await versions.report(B, 2, tried=2, error=None)
        assert [model.version for model in await versions.models()] == [2]
        assert registry.failures == []

    asyncio.run(scenario())


def test_a_failure_is_written_down_and_those_that_had_swapped_go_back() -> None:
    async def scenario() -> None:
        versions, registry, clock = make_versions()
        await settle(versions)
        registry.promote(2)
        clock.now += 1
        await versions.turn(A, 1)
        await versions.report(A, 2, tried=2, error=None)
        await versions.turn(B, 1)
        await versions.report(B, 1, tried=2, error="log-probs are NaN")
        assert registry.failures == [(2, f"{B}: log-probs are NaN")]
        assert await versions.turn(B, 1) is None
        assert number(await versions.turn(A, 2)) == 1
        await versions.report(A, 1, tried=1, error=None)
        clock.now += 5
        await settle(versions)

    asyncio.run(scenario())


def test_a_replica_that_dies_in_its_turn_fails_the_version_whoever_asks_next() -> None:
    async def scenario() -> None:
        versions, registry, clock = make_versions()
        await settle(versions)
        registry.promote(2)
        clock.now += 1
        await versions.turn(A, 1)
        clock.now += 60
        assert await versions.turn(B, 1) is None
        assert [failed for failed, _ in registry.failures] == [2]

    asyncio.run(scenario())


def test_a_replica_that_starts_during_a_swap_gets_the_version_that_is_proven() -> None:
    async def scenario() -> None:
        versions, registry, clock = make_versions()
        assert number(await versions.first()) == 1
        await settle(versions)
        registry.promote(2)
        clock.now += 1
        await versions.turn(A, 1)
        assert number(await versions.first()) == 1

    asyncio.run(scenario())


def test_one_that_starts_late_gets_what_is_served_now() -> None:
    async def scenario() -> None:
        versions, _, _ = make_versions(1, 2, promoted=(1, 2))
        await settle(versions, holding=2)
        assert number(await versions.first()) == 2

    asyncio.run(scenario())


def test_restarted_in_the_middle_of_a_swap_it_goes_on_with_it() -> None:
    async def scenario() -> None:
        versions, registry, _ = make_versions(1, 2, promoted=(1, 2))
        assert await versions.turn(A, 2) is None
        assert number(await versions.turn(B, 1)) == 2
        await versions.report(B, 2, tried=2, error=None)
        assert registry.failures == []

    asyncio.run(scenario())


def test_with_nothing_promoted_a_replica_is_told_to_come_again() -> None:
    async def scenario() -> None:
        versions, registry, clock = make_versions(promoted=())
        with pytest.raises(ApiError, match="rlhf policies promote") as refusal:
            await versions.first()
        assert refusal.value.status == 503
        assert await versions.models() == []
        registry.promote(1)
        clock.now += 1
        assert number(await versions.first()) == 1

    asyncio.run(scenario())


def test_ready_is_who_has_a_replica_that_holds_what_may_be_served() -> None:
    async def scenario() -> None:
        versions, registry, clock = make_versions()
        assert not (await versions.ready()).ready
        await settle(versions)
        assert (await versions.ready()).detail == "policy 1 is held by 2 of 2 replicas"
        registry.promote(2)
        clock.now += 1
        during = await versions.ready()
        assert during.ready
        assert during.detail == "policy 2 is held by 0 of 2 replicas"
        clock.now += 11
        assert not (await versions.ready()).ready

    asyncio.run(scenario())
