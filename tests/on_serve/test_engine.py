"""The real engine in a replica, without Serve around it: what it says, takes, refuses and leaves behind."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.registry import Registry, Version
from rlhf_ray.serving.backends import Delta, GenerateCall
from rlhf_ray.serving.engine import VllmServingEngine
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.policy import PolicyReplica
from rlhf_ray.serving.settings import PolicySettings
from rlhf_ray.types import Message
from tests.on_serve.taught import QUESTIONS, TOKENS, answer_of, taught_policy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(280)]
T = TypeVar("T")


class Running:
    """A replica and the loop that it lives in."""

    def __init__(self, versions: list[Version]) -> None:
        self.loop = asyncio.new_event_loop()
        self.versions = versions
        self.number = 0
        settings = PolicySettings(max_tokens=64, deadline_s=60, swap_deadline_s=60)
        self.replica = PolicyReplica(versions[0], self.engine, settings)
        self.wait(self.replica.start())

    @staticmethod
    def engine(folder: Path, context: int) -> VllmServingEngine:
        return VllmServingEngine(folder, context=context, kv_cache_mib=64)

    @property
    def llm(self) -> Any:
        return self.replica.engine.llm  # type: ignore[attr-defined]

    def wait(self, call: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(call, 120))

    def ask(self, question: str, **fields: Any) -> list[Delta]:
        async def deltas() -> list[Delta]:
            return [delta async for delta in self.replica.generate(self.call(question, **fields))]

        return self.wait(deltas())

    def call(self, question: str, **fields: Any) -> GenerateCall:
        self.number += 1
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, **fields}
        return GenerateCall(f"c{self.number}", messages=(Message("user", question),), **asked)

    def swap(self, number: int) -> str | None:
        return self.wait(self.replica.swapper.swap(self.versions[number - 1]))

    def answers_as(self, number: int) -> bool:
        said = {question: self.ask(question) for question in QUESTIONS}
        assert {delta.policy_version for deltas in said.values() for delta in deltas} == {number}
        return all("".join(d.text for d in deltas) == answer_of(number, question) for question, deltas in said.items())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("engine")
    registry = Registry(root / "registry")
    for number in (1, 2):
        registry.publish("policy", taught_policy(root / f"policy-{number}", number), lineage={})
    running = Running(registry.versions("policy"))
    yield running
    running.replica.close()
    registry.close()


def test_it_answers_as_its_weights_do_whole_and_in_pieces(running: Running) -> None:
    assert running.answers_as(1)
    pieces = running.ask(QUESTIONS[0], stream=True)
    assert len(pieces) > 3
    assert "".join(delta.text for delta in pieces) == answer_of(1, QUESTIONS[0])


def test_choices_seeds_and_log_probs(running: Running) -> None:
    asked = {"n": 3, "seed": 5, "temperature": 2.0, "top_p": 0.9, "logprobs": 2}
    first, again = (running.ask("never taught", **asked) for _ in range(2))
    assert [delta.token_ids for delta in first] == [delta.token_ids for delta in again]
    assert len({delta.token_ids for delta in first}) > 1
    for delta in first:
        assert delta.logprobs is not None
        assert [token.token_id for token in delta.logprobs] == list(delta.token_ids)
        assert all(token.logprob <= 0 and 1 <= len(token.top) <= 2 for token in delta.logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_without_chance_are_one_answer_several_times(running: Running, stream: bool) -> None:
    deltas = running.ask(QUESTIONS[0], n=3, stream=stream)
    for index in range(3):
        assert "".join(delta.text for delta in deltas if delta.index == index) == answer_of(1, QUESTIONS[0])
    assert [delta.index for delta in deltas if delta.finish_reason] == [0, 1, 2]


def test_what_vllm_alone_refuses_is_a_refusal_and_no_failure(running: Running) -> None:
    with pytest.raises(ApiError) as refusal:
        running.ask(QUESTIONS[0], logprobs=21)
    assert refusal.value.status == 400
    assert running.answers_as(1)


def test_a_stop_string_ends_an_answer(running: Running) -> None:
    whole = answer_of(1, QUESTIONS[0])
    (answer,) = running.ask(QUESTIONS[0], stop=("we",))
    assert (answer.text, answer.finish_reason) == (whole[: whole.index("we")], "stop")


def test_it_takes_another_version_and_goes_back(running: Running) -> None:
    for number in (2, 1):
        assert running.swap(number) is None
        assert running.answers_as(number)
        print(f"stalled for {running.replica.swapper.stalled_s:.2f} s")


def other_weights(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    rpc = running.llm.collective_rpc

    async def the_first_ones(method: str, *, args: tuple[str, ...]) -> Any:
        return await rpc(method, args=(str(running.versions[0].folder),))

    monkeypatch.setattr(running.llm, "collective_rpc", the_first_ones)


def cache_that_outlives_its_weights(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def kept() -> bool:
        return True

    monkeypatch.setattr(running.llm, "reset_prefix_cache", kept)


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [(other_weights, "read other weights"), (cache_that_outlives_its_weights, "does not sample with")],
)
def test_what_is_not_the_versions_is_found_by_hash_or_canary(
    running: Running, monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., None], reason: str
) -> None:
    with monkeypatch.context() as sabotaged:
        sabotage(running, sabotaged)
        assert reason in (running.swap(2) or "")
    if running.replica.swapper.gate.shut_because is None:
        assert running.answers_as(1)
    else:  # the sabotage hit the way back as well, and so nobody is answered
        running.replica.swapper.gate.shut_because = None
        assert running.swap(2) is None
        assert running.swap(1) is None


def test_a_stream_that_is_closed_early_is_aborted_in_the_engine(running: Running) -> None:
    async def leave() -> None:
        async with aclosing(
            running.replica.generate(running.call("never taught", stream=True, n=4, temperature=1.0))
        ) as deltas:
            await anext(deltas)
            assert running.llm.get_num_unfinished_requests() > 0

    running.wait(leave())
    assert running.llm.get_num_unfinished_requests() == 0


def test_an_engine_that_was_killed_makes_the_replica_unhealthy(running: Running) -> None:
    engines = [child for child in psutil.Process().children(recursive=True) if "VLLM" in child.name()]
    assert len(engines) == 1, "one process, which is tied to this one"
    running.wait(running.replica.check_health())
    for engine in engines:
        os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(ApiError) as refusal:
        running.ask(QUESTIONS[0])
    assert refusal.value.status == 503
    with pytest.raises(InfrastructureError, match="died"):
        running.wait(running.replica.check_health())
