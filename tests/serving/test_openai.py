"""OpenAI's own client asks, in its three ways, and is answered and refused as it expects."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from rlhf_ray.feedback.completions import Completion
from rlhf_ray.serving.backends import Delta, GenerateCall, ModelInfo, TokenLogprob
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.openai import router
from rlhf_ray.serving.settings import PolicySettings, ServiceConfig
from rlhf_ray.types import Message
from tests.serving.asgi import make_door

HELLO: Any = [{"role": "user", "content": "hello"}]
WORDS = ["we", " send", " a", " new", " one"]


class ScriptedPolicy:
    """Says its five words, whatever it is asked, one delta each or all in one."""

    def __init__(self) -> None:
        self.calls: list[GenerateCall] = []
        self.breaks_after: int | None = None
        self.refuses: ApiError | None = None
        self.ended = 0

    async def generate(self, call: GenerateCall) -> AsyncIterator[Delta]:
        self.calls.append(call)
        if self.refuses:
            raise self.refuses
        said = WORDS if call.stream else ["".join(WORDS)]
        try:
            for i, word in enumerate(said):
                if i == self.breaks_after:
                    raise ApiError(503, "the engine failed: try again", retry_after=1)
                for choice in range(call.n):
                    reason = "stop" if i == len(said) - 1 else None
                    yield Delta(choice, 7, word, (i,), self.logprobs(call, word, i), reason, prompt_tokens=3)
        finally:
            self.ended += 1

    @staticmethod
    def logprobs(call: GenerateCall, word: str, i: int) -> tuple[TokenLogprob, ...] | None:
        if call.logprobs is None:
            return None
        top = tuple(TokenLogprob(other, 9, -2.0) for other in ("x", "y")[: call.logprobs])
        return (TokenLogprob(word, i, -0.5, top),)


class KeptRecords:
    def __init__(self) -> None:
        self.kept: list[Completion] = []
        self.fails = False
        self.on_keep: Callable[[], None] = lambda: None

    async def keep_completion(self, completion: Completion) -> None:
        if self.fails:
            raise ApiError(503, "the store cannot be written", retry_after=1)
        self.on_keep()
        self.kept.append(completion)


class TwoModels:
    async def models(self) -> list[ModelInfo]:
        return [
            ModelInfo("policy", "policy", 7, "a" * 64, 1),
            ModelInfo("reward_model", "reward_model", 2, "b" * 64, 2),
        ]


class Service:
    def __init__(self) -> None:
        self.policy, self.records = ScriptedPolicy(), KeptRecords()
        self.settings = ServiceConfig(policy=PolicySettings(max_tokens=100, max_choices=4))
        routes = router(self.settings, policy=self.policy, records=self.records, versions=TwoModels())  # type: ignore[arg-type]
        self.door = make_door(routers=[routes])

    def http(self) -> httpx.AsyncClient:
        headers = {"Authorization": "Bearer app-key"}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.door), base_url="http://127.0.0.1:8000", headers=headers
        )

    @asynccontextmanager
    async def client(self, key: str = "app-key") -> AsyncIterator[openai.AsyncOpenAI]:
        async with self.http() as http:
            yield openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key=key, http_client=http, max_retries=0)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        async def go() -> httpx.Response:
            async with self.http() as http:
                return await http.post(path, json=body, headers=headers)

        return asyncio.run(go())

    def chat(self, **fields: Any) -> Any:
        """Through the async client; a stream comes back as the list of its chunks."""

        async def go() -> Any:
            async with self.client() as client:
                answer = await client.chat.completions.create(**{"model": "policy", "messages": HELLO, **fields})
                return [chunk async for chunk in answer] if fields.get("stream") else answer

        return asyncio.run(go())

    def complete(self, **fields: Any) -> Any:
        async def go() -> Any:
            async with self.client() as client:
                answer = await client.completions.create(**{"model": "policy", "prompt": "once", **fields})
                return [chunk async for chunk in answer] if fields.get("stream") else answer

        return asyncio.run(go())


@pytest.fixture
def service() -> Service:
    return Service()


def test_a_chat_answer_is_whole_and_says_its_version_and_tokens(service: Service) -> None:
    answer = service.chat(temperature=0, max_completion_tokens=9, user="u", seed=3, top_p=0.5, stop=["x"])
    assert answer.choices[0].message.content == "we send a new one"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.policy_version == 7
    assert answer.id.startswith("chatcmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 1, 4)
    call = service.policy.calls[0]
    assert call.messages == (Message("user", "hello"),)
    assert (call.temperature, call.max_tokens, call.seed, call.top_p, call.stop) == (0, 9, 3, 0.5, ("x",))
    assert not call.stream


def test_the_version_is_in_a_header_too(service: Service) -> None:
    body = {"model": "policy", "messages": HELLO}
    assert service.post("/v1/chat/completions", body).headers["x-policy-version"] == "7"
    streamed = service.post("/v1/chat/completions", {**body, "stream": True})
    assert streamed.headers["x-policy-version"] == "7"
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_completion_continues_a_text(service: Service) -> None:
    answer = service.complete(n=2)
    assert [choice.text for choice in answer.choices] == ["we send a new one"] * 2
    assert answer.id.startswith("cmpl-")
    assert service.policy.calls[0].prompt == "once"


def test_a_stream_brings_every_choice_word_by_word_and_then_the_tokens(service: Service) -> None:
    chunks = service.chat(stream=True, n=2, stream_options={"include_usage": True})
    for index in (0, 1):
        said = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(c.delta.content for c in said) == "we send a new one"
        assert said[0].delta.role == "assistant"
        assert [c.finish_reason for c in said] == [None] * 4 + ["stop"]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 10)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.policy_version for chunk in chunks} == {7}
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_completion_and_no_usage_where_none_was_asked_for(service: Service) -> None:
    chunks = service.complete(stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "we send a new one"
    assert all(chunk.choices for chunk in chunks)


def test_log_probs_of_a_chat_are_one_entry_a_token(service: Service) -> None:
    content = service.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(token.token, token.logprob) for token in content] == [("we send a new one", -0.5)]
    assert bytes(content[0].bytes).decode() == "we send a new one"
    assert [other.token for other in content[0].top_logprobs] == ["x", "y"]
    assert service.chat().choices[0].logprobs is None
    streamed = service.chat(stream=True, logprobs=True)
    assert [c.choices[0].logprobs.content[0].token for c in streamed] == WORDS


def test_log_probs_of_a_completion_say_where_each_token_begins(service: Service) -> None:
    streamed = [chunk.choices[0].logprobs for chunk in service.complete(stream=True, logprobs=1)]
    assert [entry.tokens[0] for entry in streamed] == WORDS
    assert [entry.text_offset[0] for entry in streamed] == [0, 2, 7, 9, 13]
    assert streamed[0].top_logprobs == [{"x": -2.0}]
    assert service.complete(logprobs=0).choices[0].logprobs.top_logprobs is None


def test_the_synchronous_client_is_answered_too(service: Service) -> None:
    class InThisProcess(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            async def go() -> httpx.Response:
                async with service.http() as http:
                    found = await http.request(
                        request.method, request.url, content=request.read(), headers=request.headers
                    )
                return httpx.Response(found.status_code, headers=found.headers, content=found.content)

            return asyncio.run(go())

    http = httpx.Client(transport=InThisProcess())
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="app-key", http_client=http)
    assert client.chat.completions.create(model="policy", messages=HELLO).choices[0].message.content
    stream = client.chat.completions.create(model="policy", messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "we send a new one"
    assert [model.id for model in client.models.list()] == ["policy", "reward_model"]
    assert client.models.retrieve("policy").version == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_kept_under_its_id_for_the_caller_who_asked(service: Service, stream: bool) -> None:
    answer = service.chat(stream=stream, n=2, temperature=0.7, max_tokens=5)
    kept = service.records.kept[0]
    assert kept.id == (answer[0].id if stream else answer.id)
    assert kept.answers == ("we send a new one",) * 2
    assert kept.messages == (Message("user", "hello"),)
    assert (kept.policy_version, kept.caller, kept.model) == (7, "id-app", "policy")
    assert kept.sampling == {"n": 2, "temperature": 0.7, "max_tokens": 5}


def test_whoever_does_not_want_it_kept_says_so(service: Service) -> None:
    body = {"model": "policy", "messages": HELLO}
    for stream in (False, True):
        assert service.post("/v1/chat/completions", {**body, "stream": stream}, **{"x-rlhf-store": "no"}).is_success
    assert service.records.kept == []
    assert service.post("/v1/chat/completions", body, **{"x-rlhf-store": "perhaps"}).status_code == 400


def test_a_stream_is_kept_before_the_event_that_ends_it(service: Service) -> None:
    service.records.fails = True
    text = service.post("/v1/chat/completions", {"model": "policy", "messages": HELLO, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line]
    assert events[-1]["error"]["message"] == "the store cannot be written"
    assert not [choice for event in events for choice in event.get("choices", []) if choice["finish_reason"]]


def test_an_answer_that_cannot_be_kept_is_not_given(service: Service) -> None:
    service.records.fails = True
    with pytest.raises(openai.InternalServerError) as refusal:
        service.chat()
    assert refusal.value.status_code == 503
    assert refusal.value.response.headers["retry-after"]


def test_a_stream_that_breaks_off_says_so_and_is_not_kept(service: Service) -> None:
    service.policy.breaks_after = 2
    with pytest.raises(openai.APIError, match="the engine failed"):
        service.chat(stream=True)
    assert service.records.kept == []


def test_one_that_breaks_off_without_a_word_is_not_taken_for_whole(service: Service) -> None:
    class Mute(ScriptedPolicy):
        async def generate(self, call: GenerateCall) -> AsyncIterator[Delta]:
            yield Delta(0, 7, "we", (0,), None, None, 3)

    mute = router(service.settings, policy=Mute(), records=service.records, versions=None)  # type: ignore[arg-type]
    service.door = make_door(routers=[mute])
    with pytest.raises(openai.APIError, match="broke off"):
        service.chat(stream=True)
    with pytest.raises(openai.InternalServerError, match="broke off"):
        service.chat()


def test_a_refusal_before_the_first_word_has_its_status_in_a_stream_too(service: Service) -> None:
    service.policy.refuses = ApiError(
        400, "the prompt takes 300 tokens", param="messages", code="context_length_exceeded"
    )
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refusal:
            service.chat(stream=stream)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")


def test_an_unknown_model_is_a_404(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        service.chat(model="gpt-4o")
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    assert service.policy.calls == []


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"guided_json": {}}, "guided_json"),
    ({"prompt_embeds": "x"}, "prompt_embeds"),
    ({"logit_bias": {"1": 100}}, "logit_bias"),
    ({"tools": []}, "tools"),
    ({"n": 5}, "n"),
    ({"n": 9}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": 101}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, None),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 1 << 63}, "seed"),
    ({"top_logprobs": 2}, None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, None),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "hi", "name": "bob"}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_understood_is_refused_by_name_before_the_policy_sees_it(
    service: Service, fields: dict[str, Any], param: str | None
) -> None:
    refusal = service.post("/v1/chat/completions", {"model": "policy", "messages": HELLO, **fields})
    assert refusal.status_code == 400
    found = refusal.json()["error"]["param"]
    assert found == param or (param is not None and found.startswith(f"{param}."))
    assert service.policy.calls == []


@pytest.mark.parametrize("prompt", ["", " ", ["a", "b"], [1, 2], None, 3])
def test_a_completion_takes_one_text(service: Service, prompt: Any) -> None:
    refusal = service.post("/v1/completions", {"model": "policy", "prompt": prompt})
    assert refusal.status_code == 400
    assert service.policy.calls == []


def test_parts_of_text_are_joined_and_a_developer_is_a_system(service: Service) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    service.chat(messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    assert service.policy.calls[0].messages == (Message("system", "be kind"), Message("user", "hello"))


@pytest.mark.parametrize(("key", "status"), [("annotator-key", 403), ("trainer-key", 403), ("admin-key", 200)])
def test_applications_and_administrators_may_ask(service: Service, key: str, status: int) -> None:
    found = service.post("/v1/chat/completions", {"model": "policy", "messages": HELLO}, Authorization=f"Bearer {key}")
    assert found.status_code == status


def test_a_caller_who_goes_away_ends_the_policys_work(service: Service) -> None:
    async def scenario() -> None:
        service.policy.generate = slow  # type: ignore[method-assign]
        async with service.client() as client:
            asking = asyncio.create_task(client.chat.completions.create(model="policy", messages=HELLO))
            await started.wait()
            asking.cancel()
            await asyncio.wait([asking])
            assert ended.is_set()

    started, ended = asyncio.Event(), asyncio.Event()

    async def slow(call: GenerateCall) -> AsyncIterator[Delta]:
        started.set()
        try:
            await asyncio.sleep(60)
            yield Delta(0, 7)
        finally:
            ended.set()

    asyncio.run(scenario())


def test_the_routes_do_without_torch_and_vllm() -> None:
    code = "import sys, rlhf_ray.serving.openai, rlhf_ray.serving.versions; print({'torch', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
