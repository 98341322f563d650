"""A promoted version reaches two replicas under ten requests a second: none fails, none is cut, none is wrong."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import openai
import pytest

from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.settings import PolicySettings
from tests.on_serve.running import Running, running
from tests.on_serve.taught import QUESTIONS, answer_of, taught_policy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]

PER_SECOND = 10
SWAPPED_WITHIN_S = 120


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("service")
    registry = Registry(root / "registry")
    for number in (1, 2):
        registry.publish("policy", taught_policy(root / f"policy-{number}", number), lineage={})
    registry.promote("policy", 1, by="test")
    policy = PolicySettings(replicas=2, kv_cache_mib=64, max_tokens=64, deadline_s=60, swap_deadline_s=60)
    with running(root, registry, parts={"policy", "feedback"}, policy=policy) as service:
        yield service
    registry.close()


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer, or why there was none."""

    asked_at: float
    version: int | None
    wrong: str | None


def ask(service: Running, number: int) -> Heard:
    """By turns in one piece and as a stream; what was said is held against what that version was taught."""
    asked_at, question = time.monotonic(), QUESTIONS[number % len(QUESTIONS)]
    try:
        version, text, reason = whole(service, question) if number % 2 else streamed(service, question)
    except openai.OpenAIError as error:
        return Heard(asked_at, None, repr(error))
    if (text, reason) != (answer_of(version, question), "stop"):
        return Heard(asked_at, version, f"version {version} answered {text!r}, which ended by {reason}")
    return Heard(asked_at, version, None)


def whole(service: Running, question: str) -> tuple[int, str, str]:
    answer = service.ask(question)
    return answer.policy_version, answer.choices[0].message.content, answer.choices[0].finish_reason


def streamed(service: Running, question: str) -> tuple[int, str, str]:
    chunks = list(service.ask(question, stream=True))
    (version,) = {chunk.policy_version for chunk in chunks}
    return version, "".join(chunk.choices[0].delta.content for chunk in chunks), chunks[-1].choices[0].finish_reason


def test_a_promoted_version_reaches_two_replicas_under_load(service: Running) -> None:
    heard: list[Future[Heard]] = []
    start = time.monotonic()
    with ThreadPoolExecutor(32) as callers:

        def go_on(seconds: float) -> None:
            """Ten a second, whether or not the ones before were answered."""
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                heard.append(callers.submit(ask, service, len(heard)))
                time.sleep(max(0.0, start + len(heard) / PER_SECOND - time.monotonic()))

        go_on(5)
        promoted_at = time.monotonic()
        service.registry.promote("policy", 2, by="test")
        while not all_on(2, heard, last=20):
            assert time.monotonic() - promoted_at < SWAPPED_WITHIN_S, [one.result() for one in heard if one.done()][
                -20:
            ]
            go_on(0.5)
        swapped_after = time.monotonic() - promoted_at
        go_on(3)
    answers = [one.result() for one in heard]
    seconds = max(one.asked_at for one in answers) - start
    print(f"{len(answers)} requests in {seconds:.1f} s; on both replicas {swapped_after:.1f} s after the promotion")
    assert [one.wrong for one in answers if one.wrong] == []
    assert {one.version for one in answers if one.asked_at < promoted_at} == {1}
    assert {one.version for one in answers if one.asked_at > promoted_at + swapped_after} == {2}
    assert len(answers) / seconds == pytest.approx(PER_SECOND, rel=0.1)


def all_on(version: int, heard: list[Future[Heard]], *, last: int) -> bool:
    """Whether so many answers in a row came from that version: both replicas have it then."""
    done = [one.result() for one in heard if one.done()]
    return len(done) >= last and all(one.version == version for one in done[-last:])
