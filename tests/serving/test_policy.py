"""A replica answers within its deadline, ends what nobody waits for, and says when it has to be replaced."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.models.registry import Version
from rlhf_ray.serving.backends import GenerateCall
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.policy import PolicyReplica, context_of
from rlhf_ray.serving.settings import PolicySettings
from rlhf_ray.types import Message
from tests.serving.engines import TorchEngine, make_policy_folder, make_version


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(7, make_policy_folder(tmp_path_factory.mktemp("policy") / "00000007", seed=1))


def make_replica(version: Version, **settings: float) -> tuple[PolicyReplica, TorchEngine]:
    engine = TorchEngine(version.folder)
    return PolicyReplica(version, lambda *_: engine, PolicySettings(**{"max_tokens": 8, **settings})), engine


def call(**overrides: object) -> GenerateCall:
    fields: dict[str, object] = {"id": "c", "messages": (Message("user", "my lamp"),), "temperature": 0, "stream": True}
    return GenerateCall(**{**fields, **overrides})  # type: ignore[arg-type]


def test_every_delta_names_the_version_and_the_prompts_tokens(version: Version) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(version)
        deltas = [delta async for delta in replica.generate(call(n=2, logprobs=0))]
        assert {delta.policy_version for delta in deltas} == {7}
        assert {delta.prompt_tokens for delta in deltas} == {len(await replica.rendering.ids(call()))}
        assert [delta.index for delta in deltas if delta.finish_reason] == [0, 1]
        assert all(delta.logprobs and delta.logprobs[0].token_id == delta.token_ids[0] for delta in deltas)
        assert replica.counts["answers"] == 1
        assert engine.aborted == 0

    asyncio.run(scenario())


def test_a_stream_that_is_closed_early_aborts_the_engines_work_and_leaves_the_gate(version: Version) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(version)
        async with aclosing(replica.generate(call())) as deltas:
            await anext(deltas)
            assert replica.swapper.gate.inside == engine.running == 1
        assert replica.swapper.gate.inside == engine.running == 0
        assert engine.aborted == replica.counts["aborted"] == 1

    asyncio.run(scenario())


def test_a_task_that_is_cancelled_while_it_waits_aborts_it_too(version: Version) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(version)
        engine.step.clear()
        task = asyncio.create_task(anext(replica.generate(call())))
        while not engine.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert replica.swapper.gate.inside == engine.running == 0
        assert engine.aborted == 1

    asyncio.run(scenario())


def test_an_answer_that_takes_too_long_is_a_504_and_is_aborted(version: Version) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(version, deadline_s=0.3)
        engine.step.clear()
        with pytest.raises(ApiError, match=r"not whole after 0\.3 s") as refusal:
            [delta async for delta in replica.generate(call())]
        assert refusal.value.status == 504
        assert engine.running == 0
        assert engine.aborted == 1

    asyncio.run(scenario())


def test_an_engine_that_dies_is_a_503_and_makes_the_replica_unhealthy(version: Version) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(version)
        await replica.check_health()
        deltas = replica.generate(call())
        await anext(deltas)
        engine.dead = True
        with pytest.raises(ApiError) as refusal:
            await anext(deltas)
        assert refusal.value.status == 503
        assert refusal.value.retry_after
        assert replica.counts["engine_failures"] == 1
        with pytest.raises(InfrastructureError, match="died"):
            await replica.check_health()

    asyncio.run(scenario())


@pytest.mark.parametrize(("asked", "drawn"), [(3, 3), (None, 8)])
def test_an_answer_has_what_is_asked_for_or_the_services_most(version: Version, asked: int | None, drawn: int) -> None:
    async def scenario() -> None:
        replica, _ = make_replica(version)
        deltas = [delta async for delta in replica.generate(call(max_tokens=asked))]
        assert sum(len(delta.token_ids) for delta in deltas) == drawn

    asyncio.run(scenario())


def test_a_prompt_without_room_for_its_answer_never_reaches_the_engine(version: Version) -> None:
    async def scenario() -> None:
        replica, engine = make_replica(version)
        for fields in ({"max_tokens": 47}, {"messages": (Message("user", "lamp " * 60),)}):
            with pytest.raises(ApiError) as refusal:
                await anext(replica.generate(call(**fields)))
            assert (refusal.value.status, refusal.value.code) == (400, "context_length_exceeded")
        assert engine.aborted == engine.running == 0

    asyncio.run(scenario())


def test_the_context_is_the_models_unless_less_is_wanted(version: Version) -> None:
    assert context_of(version.folder, None) == 48
    assert context_of(version.folder, 32) == 32
    with pytest.raises(ConfigError, match="more than the 48 tokens"):
        context_of(version.folder, 49)


def test_closing_ends_the_engine(version: Version) -> None:
    replica, engine = make_replica(version)
    replica.close()
    assert engine.closed


def test_a_folder_without_a_template_does_not_start(tmp_path: Path) -> None:
    folder = make_policy_folder(tmp_path / "policy", seed=1)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        PolicyReplica(make_version(1, folder), lambda *_: TorchEngine(folder), PolicySettings())
