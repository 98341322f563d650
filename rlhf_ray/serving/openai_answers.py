"""What the policy says, in OpenAI's shapes: whole answers, the events of a stream, and what is kept of them."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.feedback.completions import Completion
from rlhf_ray.serving.backends import Answer, Delta, GenerateCall, TokenLogprob
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.openai_schema import (
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    Drawn,
    Likely,
    Said,
    TextAnswer,
    TextChoice,
    TextLogprobs,
    Usage,
)
from rlhf_ray.types import FinishReason

DONE = "data: [DONE]\n\n"


@dataclass
class Gathering:
    """The deltas of one request, put together."""

    call: GenerateCall
    model: str
    created: int
    policy_version: int | None = None
    prompt_tokens: int = 0
    texts: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, FinishReason] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        """One more delta; all have to come from one version."""
        assert self.policy_version in (None, delta.policy_version), "an answer made by two versions"
        self.policy_version, self.prompt_tokens = delta.policy_version, delta.prompt_tokens
        self.texts[delta.index].append(delta.text)
        self.ids[delta.index].extend(delta.token_ids)
        self.logprobs[delta.index].extend(delta.logprobs or ())
        if delta.finish_reason:
            self.reasons[delta.index] = delta.finish_reason

    @property
    def whole(self) -> bool:
        """Whether every choice has ended."""
        return len(self.reasons) == self.call.n

    def answers(self) -> list[Answer]:
        """The choices in their order; refused where one has not ended."""
        if not self.whole:
            raise ApiError(503, "the answer broke off: try again", retry_after=1)
        return [
            Answer(
                index=index,
                text="".join(self.texts[index]),
                token_ids=tuple(self.ids[index]),
                finish_reason=reason,
                logprobs=None if self.call.logprobs is None else tuple(self.logprobs[index]),
            )
            for index, reason in sorted(self.reasons.items())
        ]

    def usage(self) -> Usage:
        """Tokens of the prompt, and of all choices together."""
        drawn = sum(map(len, self.ids.values()))
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=drawn, total_tokens=self.prompt_tokens + drawn)

    def kept(self, caller: str, sampling: dict[str, Any]) -> Completion:
        """What feedback can name later."""
        assert self.policy_version is not None
        return Completion(
            id=self.call.id,
            model=self.model,
            policy_version=self.policy_version,
            messages=self.call.messages,
            prompt=self.call.prompt,
            answers=tuple(answer.text for answer in self.answers()),
            sampling=sampling,
            caller=caller,
        )

    def answer(self) -> ChatAnswer | TextAnswer:
        """The whole body."""
        assert self.policy_version is not None
        about: dict[str, Any] = {
            "id": self.call.id,
            "created": self.created,
            "model": self.model,
            "policy_version": self.policy_version,
            "usage": self.usage(),
        }
        if self.call.messages is not None:
            return ChatAnswer(**about, choices=[_chat_choice(answer) for answer in self.answers()])
        return TextAnswer(**about, choices=[_text_choice(answer) for answer in self.answers()])

    def event(self, delta: Delta, *, usage: bool) -> str:
        """One event of the stream. Call it before `add`: a token's place in the text counts from what came before."""
        chat = self.call.messages is not None
        choice: dict[str, Any] = {"index": delta.index, "logprobs": None, "finish_reason": delta.finish_reason}
        if chat:
            first = {"role": "assistant"} if delta.index not in self.texts else {}
            choice |= {"delta": {**first, "content": delta.text}}
        else:
            choice |= {"text": delta.text}
        if delta.logprobs is not None:
            offset = sum(map(len, self.texts.get(delta.index, ())))
            shaped = chat_logprobs(delta.logprobs) if chat else text_logprobs(delta.logprobs, offset=offset)
            choice |= {"logprobs": shaped.model_dump()}
        return self._event([choice], delta.policy_version, {"usage": None} if usage else {})

    def usage_event(self) -> str:
        """The event before the last, where it was asked for."""
        return self._event([], self.policy_version, {"usage": self.usage().model_dump()})

    def _event(self, choices: list[dict[str, Any]], version: int | None, more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.call.messages is not None else "text_completion"
        about = {"id": self.call.id, "object": kind, "created": self.created, "model": self.model}
        return sse({**about, "policy_version": version, "choices": choices, **more})


def sse(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """As chat answers carry them."""
    return ChatLogprobs(
        content=[
            Drawn(**_likely(token).model_dump(), top_logprobs=[_likely(other) for other in token.top])
            for token in tokens
        ]
    )


def text_logprobs(tokens: Sequence[TokenLogprob], *, offset: int = 0) -> TextLogprobs:
    """As completions carry them; `offset` is where the first token begins in the answer."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    asked = any(token.top for token in tokens)
    return TextLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{other.token: other.logprob for other in token.top} for token in tokens] if asked else None,
        text_offset=offsets,
    )


def _likely(token: TokenLogprob) -> Likely:
    return Likely(token=token.token, logprob=token.logprob, bytes=list(token.token.encode(errors="replace")))


def _chat_choice(answer: Answer) -> ChatChoice:
    return ChatChoice(
        index=answer.index,
        message=Said(content=answer.text),
        logprobs=None if answer.logprobs is None else chat_logprobs(answer.logprobs),
        finish_reason=answer.finish_reason,
    )


def _text_choice(answer: Answer) -> TextChoice:
    return TextChoice(
        index=answer.index,
        text=answer.text,
        logprobs=None if answer.logprobs is None else text_logprobs(answer.logprobs),
        finish_reason=answer.finish_reason,
    )
