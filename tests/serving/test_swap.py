"""No answer is made by two versions or by weights in doubt; whatever fails, the old version answers again."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rlhf_ray.errors import InfrastructureError, ModelError
from rlhf_ray.models.registry import Registry, Version
from rlhf_ray.serving.backends import Delta, GenerateCall
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.policy import PolicyReplica, first_version
from rlhf_ray.serving.settings import PolicySettings
from rlhf_ray.serving.swap import check_fits
from rlhf_ray.serving.versions import Versions
from rlhf_ray.types import Message
from tests.serving.engines import TorchEngine, make_policy_folder, make_registry

HELLO = (Message("user", "my lamp"),)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("service")
    make_registry(root).close()
    return root / "registry"


@pytest.fixture
def registry(published: Path, tmp_path: Path) -> Iterator[Registry]:
    """Policies 1 to 3, of which 1 is promoted; each test has its own."""
    shutil.copytree(published, tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    yield registry
    registry.close()


@pytest.fixture
def planted(registry: Registry) -> list[Version]:
    return registry.versions("policy")


def make_replica(version: Version, name: str = "a", **settings: float) -> tuple[PolicyReplica, TorchEngine]:
    engines: list[TorchEngine] = []

    def make_engine(folder: Path, context: int) -> TorchEngine:
        engines.append(TorchEngine(folder))
        return engines[0]

    replica = PolicyReplica(version, make_engine, PolicySettings(max_tokens=8, **settings), name=name)
    return replica, engines[0]


def call(**overrides: object) -> GenerateCall:
    return GenerateCall(**{"id": "chatcmpl-1", "messages": HELLO, "temperature": 0, "stream": True, **overrides})  # type: ignore[arg-type]


async def answer(replica: PolicyReplica, **overrides: object) -> list[Delta]:
    return [delta async for delta in replica.generate(call(**overrides))]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def under_way(replica: PolicyReplica, engine: TorchEngine) -> "asyncio.Task[list[Delta]]":
    """An answer that stands still until `engine.step` is set."""
    engine.step.clear()
    task = asyncio.create_task(answer(replica))
    while not engine.running:
        await asyncio.sleep(0.001)
    return task


def test_a_version_is_taken_and_answers_as_its_own_weights_do(planted: list[Version]) -> None:
    async def scenario() -> None:
        replica, _ = make_replica(planted[0])
        await replica.start()
        before = await answer(replica)
        assert await replica.swapper.swap(planted[1]) is None
        after = await answer(replica)
        other, _ = make_replica(planted[1])
        assert text(after) == text(await answer(other)) != text(before)
        assert {delta.policy_version for delta in before} == {1}
        assert {delta.policy_version for delta in after} == {2}

    asyncio.run(scenario())


def test_an_answer_under_way_ends_with_the_version_that_began_it_and_one_that_waits_gets_the_new(
    planted: list[Version],
) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(planted[0])
        first = await under_way(replica, engine)
        swap = asyncio.create_task(replica.swapper.swap(planted[1]))
        while replica.swapper.gate.is_open:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(answer(replica))
        await asyncio.sleep(0.05)
        assert engine.loaded == []
        engine.step.set()
        assert await swap is None
        assert {delta.policy_version for delta in await first} == {1}
        assert {delta.policy_version for delta in await second} == {2}

    asyncio.run(scenario())


def test_one_that_waits_too_long_is_told_to_try_again(planted: list[Version]) -> None:
    async def scenario() -> None:
        replica, _ = make_replica(planted[0], deadline_s=0.05)
        async with replica.swapper.gate.closed(1):
            with pytest.raises(ApiError) as refusal:
                await answer(replica)
        assert refusal.value.status == 503
        assert refusal.value.retry_after

    asyncio.run(scenario())


def test_answers_that_do_not_end_leave_the_old_version_and_an_open_gate(planted: list[Version]) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(planted[0])
        replica.swapper.drain_s = 0.02
        first = await under_way(replica, engine)
        assert "answers under way" in (await replica.swapper.swap(planted[1]) or "")
        engine.step.set()
        assert {delta.policy_version for delta in await first} == {1}
        assert (await answer(replica))[0].policy_version == 1
        assert engine.loaded == []

    asyncio.run(scenario())


def fails_to_load(engine: TorchEngine) -> None:
    engine.fails_to_load = {2}


def hangs(engine: TorchEngine) -> None:
    load = engine.load

    async def hang(folder: Path) -> str:
        if folder.name.endswith("2"):
            await asyncio.sleep(60)
        return await load(folder)

    engine.load = hang  # type: ignore[method-assign]


def reads_other_bytes(engine: TorchEngine) -> None:
    load = engine.load

    async def other(folder: Path) -> str:
        return await load(folder) + ("!" if folder.name.endswith("2") else "")

    engine.load = other  # type: ignore[method-assign]


def keeps_old_weights(engine: TorchEngine) -> None:
    engine.keeps_old_weights = True


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        (fails_to_load, "the worker raised"),
        (hangs, "took more than 4 s"),
        (reads_other_bytes, "read other weights"),
        (keeps_old_weights, "does not sample with"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failed_load_restores_the_old_weights(
    planted: list[Version], sabotage: Callable[[TorchEngine], None], reason: str
) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(planted[0], swap_deadline_s=4)
        before = text(await answer(replica))
        sabotage(engine)
        assert reason in (await replica.swapper.swap(planted[1]) or "")
        assert replica.holding == 1
        assert engine.loaded[-1] == 1
        assert text(await answer(replica)) == before
        await replica.check_health()

    asyncio.run(scenario())


def test_where_the_old_weights_do_not_come_back_nobody_is_answered_and_the_replica_is_unhealthy(
    planted: list[Version],
) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(planted[0])
        engine.fails_to_load = {1, 2}
        assert "the worker raised" in (await replica.swapper.swap(planted[1]) or "")
        with pytest.raises(ApiError, match="replaced"):
            await answer(replica)
        with pytest.raises(InfrastructureError, match="neither the new weights"):
            await replica.check_health()

    asyncio.run(scenario())


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_one_bit_flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncated, with_one_bit_flipped, without_weights])
def test_a_damaged_version_is_refused_before_the_gate_closes(
    planted: list[Version], damage: Callable[[Path], None]
) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(planted[0])
        damage(planted[1].folder)
        first = await under_way(replica, engine)
        assert "policy 2" in (await replica.swapper.swap(planted[1]) or "")
        assert replica.swapper.gate.is_open
        assert engine.loaded == []
        engine.step.set()
        await first

    asyncio.run(scenario())


def with_another_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def with_another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<PAD>"'))


@pytest.mark.parametrize("change", [with_another_template, with_another_tokenizer])
def test_a_version_with_another_tokenizer_needs_a_new_service(tmp_path: Path, change: Callable[[Path], None]) -> None:
    held, wanted = (make_policy_folder(tmp_path / name, seed=1) for name in ("held", "wanted"))
    check_fits(held, wanted, 2)
    change(wanted)
    with pytest.raises(ModelError, match=r"differs from the one in use.*start a new service"):
        check_fits(held, wanted, 2)


def test_a_version_of_another_size_needs_a_new_service(tmp_path: Path) -> None:
    held, wide = make_policy_folder(tmp_path / "held", 1), make_policy_folder(tmp_path / "wide", 1, hidden=64)
    with pytest.raises(ModelError, match=r"head_dim .* 16 and would be 32.*start a new service"):
        check_fits(held, wide, 2)


def test_a_replica_that_starts_with_other_weights_than_its_versions_does_not_start(planted: list[Version]) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(planted[0])
        await engine.load(planted[1].folder)
        with pytest.raises(InfrastructureError, match="does not sample with"):
            await replica.start()

    asyncio.run(scenario())


async def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def two_replicas(registry: Registry) -> AsyncIterator[tuple[PolicyReplica, PolicyReplica]]:
    """Both hold policy 1 and follow the registry."""
    versions = Versions(registry, lease_s=30, alive_s=1)
    held = registry.version("policy", 1)
    replicas = make_replica(held, "a")[0], make_replica(held, "b")[0]
    followers = [asyncio.create_task(replica.follow(versions)) for replica in replicas]
    try:
        await until(lambda: versions.turns.settled == 1)
        yield replicas
    finally:
        for task in followers:
            task.cancel()
        await asyncio.wait(followers)


def test_a_promoted_version_reaches_both_replicas_while_they_answer(registry: Registry) -> None:
    async def scenario() -> None:
        seen: list[set[int]] = []

        async def keep_asking(replica: PolicyReplica) -> None:
            while replica.holding == 1 or len(seen) < 20:
                seen.append({delta.policy_version for delta in await answer(replica)})

        async with two_replicas(registry) as (a, b):
            asking = asyncio.gather(keep_asking(a), keep_asking(b))
            registry.promote("policy", 2, by="test")
            await until(lambda: a.holding == b.holding == 2)
            await asking
        assert all(len(versions) == 1 for versions in seen)
        assert {1} in seen
        assert {2} in seen

    asyncio.run(scenario())


def test_one_replica_that_fails_brings_the_other_back(registry: Registry) -> None:
    async def scenario() -> None:
        async with two_replicas(registry) as (a, b):
            b.engine.fails_to_load = {2}  # type: ignore[attr-defined]
            registry.promote("policy", 2, by="test")
            await until(lambda: registry.history("policy")[-1].state == "failed")
            assert registry.history("policy")[-1].reason == "b: the worker raised"
            await until(lambda: a.holding == b.holding == 1)
            assert {delta.policy_version for delta in await answer(a)} == {1}
            registry.promote("policy", 3, by="test")
            await until(lambda: a.holding == b.holding == 3)

    asyncio.run(scenario())


def test_a_desk_that_cannot_be_reached_is_asked_again(registry: Registry) -> None:
    class Unreachable(Versions):
        broken = True

        async def turn(self, replica: str, holding: int) -> Version | None:
            if self.broken:
                raise InfrastructureError("no such actor")
            return await super().turn(replica, holding)

    async def scenario() -> None:
        replica, _ = make_replica(registry.version("policy", 1))
        registry.promote("policy", 2, by="test")
        versions = Unreachable(registry, lease_s=30)
        follower = asyncio.create_task(replica.follow(versions))
        await until(lambda: replica.counts["unasked"] > 0)
        versions.broken = False
        await until(lambda: replica.holding == 2)
        follower.cancel()

    asyncio.run(scenario())


def test_a_replica_waits_for_a_first_promotion(tmp_path: Path) -> None:
    async def scenario() -> None:
        registry = Registry(tmp_path / "registry")
        starting = asyncio.create_task(first_version(Versions(registry, lease_s=30), wait_s=20))
        await asyncio.sleep(0.05)
        registry.publish("policy", make_policy_folder(tmp_path / "policy", 1), lineage={})
        registry.promote("policy", 1, by="test")
        assert (await starting).number == 1

    asyncio.run(scenario())
