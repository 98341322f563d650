"""A policy behind Ray Serve with the real engine: OpenAI's client, answers by version, and a swap under load."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve

from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.app import application
from rlhf_ray.serving.auth import KeyStore
from rlhf_ray.serving.settings import PolicySettings, ServiceConfig
from tests.on_serve.taught import QUESTIONS, TOKENS, answer_of, taught_policy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(280)]


@dataclass
class Running:
    url: str
    key: str
    registry: Registry

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def ask(self, question: str, **fields: Any) -> Any:
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, **fields}
        return self.client().chat.completions.create(
            model="policy", messages=[{"role": "user", "content": question}], **asked
        )

    def promoted(self) -> int:
        version = self.registry.promoted("policy")
        assert version
        return version.number


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("service")
    registry = Registry(root / "registry")
    for number in (1, 2, 3):
        registry.publish("policy", taught_policy(root / f"policy-{number}", number), lineage={})
    registry.promote("policy", 1, by="test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServiceConfig(
        registry=registry.root,
        store=str(root / "feedback.db"),
        keys=str(root / "keys.db"),
        port=port,
        parts=frozenset({"policy", "feedback"}),
        policy=PolicySettings(kv_cache_mib=64, max_tokens=64, deadline_s=60, swap_deadline_s=60),
    )
    running = Running(f"http://127.0.0.1:{port}", KeyStore(config.keys).create("test", "admin"), registry)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(config), name="test")
    yield running
    serve.shutdown()
    ray.shutdown()
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
    headers = {"Authorization": f"Bearer {service.key}"}
    body = {"completion_id": answer.id, "rating": 4}
    found = httpx.post(f"{service.url}/v1/feedback", json=body, headers=headers, timeout=30)
    assert found.status_code == 201, found.text


class Asker(threading.Thread):
    """Asks again and again, by turns in one piece and as a stream, and holds each answer against its version's."""

    def __init__(self, service: Running, number: int) -> None:
        super().__init__(daemon=True)
        self.service, self.number = service, number
        self.stop = threading.Event()
        self.versions: list[int] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        turn = self.number
        while not self.stop.is_set():
            turn += 1
            question = QUESTIONS[turn % len(QUESTIONS)]
            try:
                version, text = self.whole(question) if turn % 2 else self.streamed(question)
            except openai.OpenAIError as error:
                self.wrong.append(repr(error))
                continue
            self.versions.append(version)
            if text != answer_of(version, question):
                self.wrong.append(f"version {version} answered {text!r}")

    def whole(self, question: str) -> tuple[int, str]:
        answer = self.service.ask(question)
        return answer.policy_version, answer.choices[0].message.content

    def streamed(self, question: str) -> tuple[int, str]:
        chunks = list(self.service.ask(question, stream=True))
        versions = {chunk.policy_version for chunk in chunks}
        assert len(versions) == 1, "an answer made by two versions"
        return versions.pop(), "".join(chunk.choices[0].delta.content for chunk in chunks)


def wait_until_served(service: Running, number: int, within_s: float = 90) -> float:
    start = time.monotonic()
    while service.ask(QUESTIONS[0]).policy_version != number:
        assert time.monotonic() - start < within_s, f"version {number} is not served"
        time.sleep(0.2)
    return time.monotonic() - start


def test_a_promoted_version_is_taken_under_load_and_no_answer_is_wrong_or_lost(service: Running) -> None:
    askers = [Asker(service, number) for number in range(4)]
    for asker in askers:
        asker.start()
    time.sleep(2)
    service.registry.promote("policy", 2, by="test")
    seconds = wait_until_served(service, 2)
    time.sleep(1)
    for asker in askers:
        asker.stop.set()
    for asker in askers:
        asker.join(60)
    print(f"served after {seconds:.1f} s, {sum(len(asker.versions) for asker in askers)} answers")
    assert [line for asker in askers for line in asker.wrong] == []
    assert {version for asker in askers for version in asker.versions} == {1, 2}


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
    headers = {"Authorization": f"Bearer {service.key}"}
    for _ in range(40):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=0.03)
    start = time.monotonic()
    service.ask(QUESTIONS[0])
    assert time.monotonic() - start < 20
