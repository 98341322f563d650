"""Prompts to token ids, by the policy's own tokenizer and chat template, off the event loop and with a deadline."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.models.policy import encode_prompt
from rlhf_ray.serving.backends import GenerateCall
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.types import Message, Prompt

DEADLINE_S = 5.0
PROOF_DEADLINE_S = 10.0
SHORTEST_LONGEST = 16
"""Characters that some token is taken to cover at least."""


class Rendering:
    """Makes token ids of requests. The template is the folder's, never a request's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context: int, threads: int = 2) -> None:
        """`ModelError` where the template does not render a short dialogue within ten seconds."""
        tokenizer.model_max_length = 1 << 30  # lengths are judged here
        self.tokenizer = tokenizer
        self.context = context
        self.vocabulary = len(tokenizer)
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        self.most_characters = context * max(longest, SHORTEST_LONGEST)
        _prove(tokenizer)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="render")

    async def ids(self, call: GenerateCall) -> list[int]:
        """The prompt's token ids; 400 where they leave no room in the context for an answer."""
        param = "prompt" if call.messages is None else "messages"
        self._hold_to_context(self._characters(call) / self.most_characters * self.context, param)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DEADLINE_S):
                ids = await loop.run_in_executor(self._threads, self._encode, call)
        except TimeoutError:
            raise ApiError(503, f"the prompt was not rendered within {DEADLINE_S:g} s", retry_after=1) from None
        except DataError as error:
            raise ApiError(400, str(error), param=param) from None
        if not ids:
            raise ApiError(400, "the prompt has no tokens: give it some text", param=param)
        self._hold_to_context(len(ids), param)
        return ids

    def room(self, prompt_tokens: int, asked: int | None, most: int) -> int:
        """How many tokens the answer may have; 400 where more are asked for than the context holds."""
        left = self.context - prompt_tokens
        if asked is not None and asked > left:
            raise ApiError(
                400,
                f"the prompt takes {prompt_tokens} tokens and max_tokens asks for {asked} more: "
                f"the context holds {self.context}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(left, most) if asked is None else asked

    def _encode(self, call: GenerateCall) -> list[int]:
        if call.messages is not None:
            return encode_prompt(self.tokenizer, Prompt("of the request", call.messages, ""))
        assert call.prompt is not None, "a call has messages or a prompt"
        ids: list[int] = self.tokenizer(call.prompt)["input_ids"]
        return ids

    def _characters(self, call: GenerateCall) -> int:
        return len(call.prompt or "") + sum(len(message.content) for message in call.messages or ())

    def _hold_to_context(self, tokens: float, param: str) -> None:
        if tokens >= self.context:
            raise ApiError(
                400,
                f"the prompt takes {'at least ' if tokens != int(tokens) else ''}{int(tokens)} tokens and leaves no "
                f"room for an answer: the context holds {self.context}",
                param=param,
                code="context_length_exceeded",
            )


def _prove(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template may hold a loop without end; a thread cannot be stopped, so it must not be waited for at exit."""
    outcome: Future[int] = Future()

    def render() -> None:
        prompt = Prompt("that proves the chat template", (Message("user", "hello"),), "")
        try:
            outcome.set_result(len(encode_prompt(tokenizer, prompt)))
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            outcome.set_exception(ModelError(f"the chat template does not render a dialogue: {type(error).__name__}"))

    threading.Thread(target=render, daemon=True).start()
    try:
        tokens = outcome.result(PROOF_DEADLINE_S)
    except TimeoutError:
        raise ModelError(f"the chat template does not render a dialogue within {PROOF_DEADLINE_S:g} s") from None
    if not tokens:
        raise ModelError("the chat template renders a dialogue to nothing")
