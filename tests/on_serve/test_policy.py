"""A policy behind Ray Serve with the real engine: OpenAI's client, answers by version, and a swap under load."""

import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.settings import PolicySettings
from tests.on_serve.running import Running, running
from tests.on_serve.taught import QUESTIONS, answer_of, taught_policy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("service")
    registry = Registry(root / "registry")
    for number in (1, 2, 3):
        registry.publish("policy", taught_policy(root / f"policy-{number}", number), lineage={})
    registry.promote("policy", 1, by="test")
    policy = PolicySettings(kv_cache_mib=64, max_tokens=64, deadline_s=60, swap_deadline_s=60)
    with running(root, registry, parts={"policy", "feedback"}, policy=policy) as service:
        yield service
    registry.close()


def test_each_answer_is_the_one_of_the_version_that_it_names(service: Running) -> None:
    for question in QUESTIONS:
        answer = service.ask(question)
        assert answer.choices[0].message.content == answer_of(1, question)
        assert answer.policy_version == 1


def test_a_stream_says_the_same_in_pieces_and_counts_its_tokens(service: Running) -> None:
    chunks = list(service.ask(QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == answer_of(1, QUESTIONS[0])
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == service.ask(QUESTIONS[0]).usage.completion_tokens > 1


def test_choices_log_probs_and_seeds(service: Running) -> None:
    asked = {"n": 3, "seed": 5, "temperature": 2.0, "logprobs": True, "top_logprobs": 2}
    answers = [service.ask("something it was never taught", **asked) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    content = answers[0].choices[0].logprobs.content
    assert all(token.logprob <= 0 and 1 <= len(token.top_logprobs) <= 2 for token in content)
    assert sum(len(choice.logprobs.content) for choice in answers[0].choices) == answers[0].usage.completion_tokens


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(service: Running) -> None:
    whole = answer_of(1, QUESTIONS[0])
    stop = whole[len(whole) // 2 :][:3]
    answer = service.ask(QUESTIONS[0], stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_a_prompt_that_is_too_long_never_reaches_the_engine(service: Running) -> None:
    for question in ("lamp " * 300, "lamp " * 15_000):
        with pytest.raises(openai.BadRequestError) as refusal:
            service.ask(question)
        assert refusal.value.code == "context_length_exceeded"


def test_feedback_can_name_an_answer_as_soon_as_it_is_there(service: Running) -> None:
    answer = service.ask(QUESTIONS[0])
    body = {"completion_id": answer.id, "rating": 4}
    found = httpx.post(f"{service.url}/v1/feedback", json=body, headers=service.headers, timeout=30)
    assert found.status_code == 201, found.text


def test_a_version_that_was_damaged_after_its_promotion_fails_and_the_old_one_answers_on(service: Running) -> None:
    before = service.ask(QUESTIONS[0]).policy_version
    weights = service.registry.version("policy", 3).folder / "model.safetensors"
    service.registry.promote("policy", 3, by="test")
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-64])
    deadline = time.monotonic() + 60
    while service.promoted() == 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert service.registry.history("policy")[-1].state == "failed"
    assert service.promoted() == before
    answer = service.ask(QUESTIONS[0])
    assert answer.choices[0].message.content == answer_of(before, QUESTIONS[0])


def test_a_caller_who_goes_away_frees_the_replica(service: Running) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": "hello"}], "n": 8, "max_tokens": 64}
    for _ in range(40):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=service.headers, timeout=0.03)
    start = time.monotonic()
    service.ask(QUESTIONS[0])
    assert time.monotonic() - start < 20
