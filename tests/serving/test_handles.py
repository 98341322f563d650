"""What Ray raises becomes what a caller can act on; what was safe to try again was tried again."""

import asyncio
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from rlhf_ray.serving.backends import Delta, GenerateCall, Readiness, ScoreItem, Scores
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.handles import PolicyHandle, RecordsHandle, RewardHandle, VersionsHandle

CALL = GenerateCall("chatcmpl-1", prompt="Hi")
SCORES = Scores(1, "reward-model", (0.5,))
FULL = BackPressureError(10, 10)


def from_replica(error: Exception) -> RayTaskError:
    """As it arrives: a class of Ray's that is the error's class, too."""
    return RayTaskError("score", "its traceback", error).as_instanceof_cause()


class Stream:
    """A replica's answers, of which an exception is one and a number a pause."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.cancelled = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        while self.items:
            item = self.items.pop(0)
            if isinstance(item, float):
                await asyncio.sleep(item)
            elif isinstance(item, Exception):
                raise item
            else:
                return item
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """Answers calls of any method from a list, one a call."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[str] = []

    def options(self, **_: Any) -> "FakeHandle":
        return self

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any, **fields: Any) -> Any:
            self.calls.append(method)
            answer = self.answers.pop(0)
            return answer if isinstance(answer, Stream) else self._one(answer)

        return SimpleNamespace(remote=remote)

    async def _one(self, answer: Any) -> Any:
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer


def died() -> ActorDiedError:
    return ActorDiedError()


def delta(text: str, version: int = 1) -> Delta:
    return Delta(0, version, text)


async def told(handle: FakeHandle, deadline_s: float = 5) -> list[str]:
    return [delta.text async for delta in PolicyHandle(handle, deadline_s=deadline_s).generate(CALL)]


def refusal(work: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        asyncio.run(work())
    return refused.value


def test_a_replicas_own_refusal_arrives_as_it_was() -> None:
    own = ApiError(400, "prompt and answer exceed the context", param="max_tokens", code="context_length_exceeded")
    for wrapped in (copy.copy(own), from_replica(own)):
        error = refusal(lambda wrapped=wrapped: told(FakeHandle(Stream([wrapped]))))
        assert (type(error), error.status, error.body()) == (ApiError, 400, own.body())


@pytest.mark.parametrize(
    ("raised", "status", "code", "retry_after"),
    [
        (FULL, 503, "overloaded", 2),
        (from_replica(FULL), 503, "overloaded", 2),
        (TimeoutError(), 504, "deadline_exceeded", None),
    ],
)
def test_what_ray_raises_becomes_what_a_caller_can_act_on(
    raised: Exception, status: int, code: str, retry_after: float | None
) -> None:
    error = refusal(lambda: RewardHandle(FakeHandle(raised), deadline_s=5).score([]))
    assert (error.status, error.code, error.retry_after) == (status, code, retry_after)


def test_an_answer_that_had_not_begun_is_asked_of_another_replica() -> None:
    for gone in (died(), from_replica(died())):
        handle = FakeHandle(Stream([gone]), Stream([delta("He"), delta("llo")]))
        assert asyncio.run(told(handle)) == ["He", "llo"]
        assert len(handle.calls) == 2


def test_two_deaths_are_said_and_not_tried_on_and_on() -> None:
    handle = FakeHandle(Stream([died()]), Stream([died()]), Stream([delta("late")]))
    error = refusal(lambda: told(handle))
    assert (error.status, error.retry_after, len(handle.calls)) == (503, 5, 2)


def test_an_answer_that_had_begun_is_never_begun_again() -> None:
    handle = FakeHandle(Stream([delta("He"), died()]), Stream([delta("Hello")]))
    got: list[str] = []

    async def go() -> None:
        async for part in PolicyHandle(handle, deadline_s=5).generate(CALL):
            got.append(part.text)

    assert refusal(go).status == 503
    assert (got, len(handle.calls)) == (["He"], 1)


def test_a_full_queue_is_not_asked_again() -> None:
    handle = FakeHandle(Stream([FULL]), Stream([delta("late")]))
    assert refusal(lambda: told(handle)).status == 503
    assert len(handle.calls) == 1


def test_an_answer_that_takes_too_long_is_given_up_and_the_replica_told() -> None:
    stream = Stream([delta("He"), 10.0, delta("llo")])
    assert refusal(lambda: told(FakeHandle(stream), deadline_s=0.05)).status == 504
    assert stream.cancelled


def test_who_leaves_ends_the_replicas_work() -> None:
    stream = Stream([delta("He"), delta("llo")])

    async def go() -> None:
        answers = PolicyHandle(FakeHandle(stream), deadline_s=5).generate(CALL)
        assert (await anext(answers)).text == "He"
        await answers.aclose()

    asyncio.run(go())
    assert stream.cancelled


def test_a_stream_may_go_on_in_another_task_than_it_began_in() -> None:
    stream = Stream([delta("He"), 0.01, delta("llo"), 10.0])

    async def rest(answers: Any, got: list[str]) -> None:
        async for part in answers:
            got.append(part.text)

    async def go() -> tuple[list[str], ApiError]:
        answers, got = PolicyHandle(FakeHandle(stream), deadline_s=0.2).generate(CALL), []
        got.append((await anext(answers)).text)
        with pytest.raises(ApiError) as refused:
            await asyncio.create_task(rest(answers, got))
        await asyncio.sleep(0.3)  # nobody cancels the task that began it
        return got, refused.value

    got, error = asyncio.run(go())
    assert (got, error.status) == (["He", "llo"], 504)


def test_scores_are_asked_for_again_for_they_change_nothing() -> None:
    handle = FakeHandle(died(), [SCORES])
    assert asyncio.run(RewardHandle(handle, deadline_s=5).score([ScoreItem((), "Hi")])) == SCORES
    error = refusal(lambda: RewardHandle(FakeHandle(10.0), deadline_s=0.02).score([]))
    assert (error.status, error.code) in {(504, "deadline_exceeded"), (503, "deadline_exceeded")}


class Scorers:
    """Replicas that answer when they are told to, and note what each call brought."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go = asyncio.Event()
        self.score_each = SimpleNamespace(remote=self._score_each)

    async def _score_each(self, requests: list[list[ScoreItem]]) -> list[Scores | ApiError]:
        self.calls.append([item.completion for items in requests for item in items])
        await self.go.wait()
        return [self._scores(items) for items in requests]

    def _scores(self, items: list[ScoreItem]) -> Scores | ApiError:
        if any(item.completion == "nan" for item in items):
            return ApiError(500, "a score that is no number", code="not_finite")
        return Scores(1, "reward-model", tuple(float(len(item.completion)) for item in items))


async def asked(scorers: Scorers, texts: list[str], **limits: int) -> list[Any]:
    handle = RewardHandle(scorers, deadline_s=5, **limits)
    waiting = []
    for text in texts:
        waiting.append(asyncio.create_task(handle.score([ScoreItem((), text)])))
        for _ in range(3):  # so that each is on its way before the next is asked for
            await asyncio.sleep(0)
    scorers.go.set()
    return await asyncio.gather(*waiting, return_exceptions=True)


def test_scores_asked_for_while_calls_are_under_way_share_the_next_call() -> None:
    async def run() -> tuple[list[list[str]], list[Any]]:
        scorers = Scorers()
        return scorers.calls, await asked(scorers, ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"], calls=2, batch=3)

    calls, answers = asyncio.run(run())
    assert calls == [["a"], ["bb"], ["ccc", "dddd", "eeeee"], ["ffffff"]]
    assert [answer.rewards for answer in answers] == [(1.0,), (2.0,), (3.0,), (4.0,), (5.0,), (6.0,)]


def test_a_request_that_fails_leaves_those_of_its_call_alone() -> None:
    async def run() -> list[Any]:
        return await asked(Scorers(), ["a", "bb", "nan", "dddd"])

    first, second, failed, last = asyncio.run(run())
    assert [answer.rewards for answer in (first, second, last)] == [(1.0,), (2.0,), (4.0,)]
    assert (failed.status, failed.code) == (500, "not_finite")


def test_more_answers_than_may_wait_are_refused() -> None:
    async def run() -> list[Any]:
        return await asked(Scorers(), ["a", "bb", "ccc", "dddd"], queue=2)

    *scored, refused = asyncio.run(run())
    assert [len(answer.rewards) for answer in scored] == [1, 1, 1]
    assert (refused.status, refused.retry_after) == (503, 1)


def test_feedback_that_may_be_written_already_is_not_sent_again() -> None:
    handle = FakeHandle(died(), "receipt")
    error = refusal(lambda: RecordsHandle(handle).add_feedback("submission"))
    assert (error.status, error.retry_after, handle.calls) == (503, 5, ["add_feedback"])


@pytest.mark.parametrize("method", ["completion", "feedback", "answered", "keep_completion"])
def test_what_is_safe_to_do_twice_at_the_store_is_tried_twice(method: str) -> None:
    handle = FakeHandle(died(), None)
    assert asyncio.run(getattr(RecordsHandle(handle), method)("chatcmpl-1")) is None
    assert handle.calls == [method, method]


def test_a_replica_that_asks_for_its_turn_hears_of_it_itself_when_nobody_answers() -> None:
    for call in (lambda desk: desk.turn("a", 1), lambda desk: desk.report("a", 1, tried=2, error=None)):
        handle = FakeHandle(died(), None)
        assert refusal(lambda call=call, handle=handle: call(VersionsHandle(handle))).status == 503
        assert len(handle.calls) == 1
    assert asyncio.run(VersionsHandle(FakeHandle(Readiness(True, "yes"))).ready()).ready


def test_what_is_our_own_mistake_stays_one() -> None:
    mistake = from_replica(KeyError("x"))
    with pytest.raises(KeyError):
        asyncio.run(RewardHandle(FakeHandle(mistake), deadline_s=5).score([]))
