"""Dialogues of several turns: what the policy talks to, and what such a dialogue is in the policy's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_ray.models.policy import decode_response, encode_prompt, encode_reply
from rlhf_ray.plugins import load_plugin
from rlhf_ray.types import Exchange, GenerationRequest, Inserted, Message, Prompt, Rollout, Span


class Environment(Protocol):
    """Whom the policy talks to, for one dialogue. It lives with the driver; what it raises is the run's error."""

    def observe(self) -> Sequence[Message]:
        """What the policy has not heard yet, the user's turn last: at first the prompt, then replies to its answers."""

    def act(self, response: str) -> bool:
        """Takes the policy's answer; whether the dialogue goes on."""

    def reward(self) -> float | None:
        """What the whole dialogue earned, asked once at its end; None leaves that to other sources of rewards."""


MakeEnvironment = Callable[[Prompt, int], Environment]
"""From a prompt and a seed that derives from the rollout's identity: a redone dialogue meets the same environment."""


def load_environment(of: str) -> MakeEnvironment:
    """`package.module:make`, a class or a function; `ConfigError` where there is none."""
    make: MakeEnvironment = load_plugin(of, key="rollout.environment")
    return make


class Episode:
    """One dialogue under way, in text and in tokens. Tokens are only appended: what was sampled stays as it was."""

    def __init__(
        self,
        id: str,
        prompt: Prompt,
        environment: Environment,
        tokenizer: PreTrainedTokenizerBase,
        *,
        turns: int,
        room: int,
    ) -> None:
        """`turns`: answers at most; `room`: tokens kept for each."""
        self.id, self.prompt, self.environment, self.tokenizer = id, prompt, environment, tokenizer
        self.turns, self.room = turns, room
        self._said = list(environment.observe())
        self._ids = encode_prompt(tokenizer, replace(prompt, messages=tuple(self._said)), room=room)
        self._answers: list[Rollout] = []
        self._heard: list[tuple[int, ...]] = []

    def request(self, seed: int) -> GenerationRequest:
        """The next answer."""
        return GenerationRequest(self.id, self.prompt.id, tuple(self._ids), seed)

    def answered(self, answer: Rollout) -> bool:
        """Takes an answer in; whether another is wanted.

        A dialogue ends where the environment ends it, an answer was cut, the turns are over, or the context is full.
        """
        text = decode_response(self.tokenizer, answer.response_ids)
        self._answers.append(answer)
        self._said.append(Message("assistant", text))
        goes_on = self.environment.act(text)
        if not goes_on or answer.finish_reason != "stop" or len(self._answers) == self.turns:
            return False
        reply = list(self.environment.observe())
        heard = encode_reply(self.tokenizer, self._said, reply)
        ids = [*answer.prompt_ids, *answer.response_ids, *heard]
        if len(ids) + self.room > self.tokenizer.model_max_length:
            return False
        self._said += reply
        self._ids = ids
        self._heard.append(tuple(heard))
        return True

    def rollout(self) -> Rollout:
        """The whole dialogue as one rollout: all that the policy said is its response."""
        answers = self._answers
        ends = list(accumulate(len(answer.response_ids) for answer in answers))
        spans: list[Span] = []
        for start, answer in zip([0, *ends], answers, strict=False):
            for span in (Span(0, answer.weights_step), *answer.swaps):
                if not spans or spans[-1].weights_step != span.weights_step:
                    spans.append(Span(start + span.start, span.weights_step))
        return replace(
            answers[0],
            response_ids=tuple(id for answer in answers for id in answer.response_ids),
            logprobs=tuple(logprob for answer in answers for logprob in answer.logprobs),
            finish_reason=answers[-1].finish_reason,
            swaps=tuple(spans[1:]),
            inserted=tuple(Inserted(end, heard) for end, heard in zip(ends, self._heard, strict=False)),
        )

    def exchange(self) -> Exchange:
        """The same as text: the last answer, to all that was said before it, and what the environment gives for it."""
        *before, last = self._said
        return Exchange(replace(self.prompt, messages=tuple(before)), last.content, self.environment.reward())
