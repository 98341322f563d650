"""OpenAI's requests and answers, as far as they are served: closed, so that the unknown is refused by name."""

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.feedback.schema import MAX_TEXT
from rlhf_ray.serving.backends import GenerateCall
from rlhf_ray.types import Message

MODEL = "policy"
"""The one name that a request gives as `model`."""
MAX_TURNS = 256
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Choices = Annotated[int, Field(ge=1, le=8)]
Tokens = Annotated[int, Field(ge=1, le=1 << 20)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty: give one with words in it")
    return text


class Closed(BaseModel):
    """A shape that takes no field that it does not know, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class TextPart(Closed):
    """A piece of a turn. Only text is understood."""

    type: Literal["text"]
    text: Text


class Turn(Closed):
    """One turn of the dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, AfterValidator(_not_blank)] | Annotated[list[TextPart], Field(min_length=1, max_length=16)]

    def message(self) -> Message:
        """In the project's own words; `developer` is OpenAI's newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Closed):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    """One more event before the last, with the number of tokens."""


class Asked(Closed):
    """What both kinds of request have in common."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    """`policy`; see `/v1/models`."""
    n: Choices | None = None
    max_tokens: Tokens | None = None
    """Of each answer; by default as many as the context holds, up to the service's limit."""
    temperature: Temperature | None = None
    """0: always the likeliest token."""
    top_p: TopP | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Texts at which an answer ends; they are not part of it."""
    seed: Seed | None = None
    """The same request with the same seed and policy version draws the same answer."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    """Taken and not used."""

    @model_validator(mode="after")
    def _streams(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """What was asked for of the sampler, as it is kept beside the answer."""
        asked = self.model_dump(include={"n", "temperature", "top_p", "stop", "seed"}, exclude_none=True)
        return {**asked, **({"max_tokens": self.limit} if self.limit is not None else {})}

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    def call(self, id: str) -> GenerateCall:
        """In the words of the policy."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerateCall(
            id=id,
            n=self.n or 1,
            max_tokens=self.limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(stop),
            seed=self.seed,
            stream=bool(self.stream),
            **self._prompt(),
        )

    @abstractmethod
    def _prompt(self) -> dict[str, Any]:
        """The part of the call that says what is to be answered: `messages` or `prompt`."""


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "policy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}]
        }
    )

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS)]
    """The dialogue, oldest turn first; the user's comes last."""
    max_completion_tokens: Tokens | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """The log-prob of each token, of the distribution that it was drawn from."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many alternatives to show for each token."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError(f"messages end with the {self.messages[-1].role}'s turn: the user's has to be the last")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    def _prompt(self) -> dict[str, Any]:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return {"messages": tuple(turn.message() for turn in self.messages), "logprobs": logprobs}


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "policy", "prompt": "Hello", "max_tokens": 16}]}
    )

    prompt: Annotated[Text, AfterValidator(_not_blank)]
    """Text that is continued as it is, no chat template around it. One prompt a request."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """How many alternatives to show for each token; 0: the token's own log-prob alone."""

    def _prompt(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "logprobs": self.logprobs}


class Usage(BaseModel):
    """How many tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(BaseModel):
    """A token and its log-prob."""

    token: str
    logprob: float
    bytes: list[int]


class Drawn(Likely):
    """A token of an answer, and what else could have been drawn."""

    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[Drawn]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Lists of equal length, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Said(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """What a chat request is answered with."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    policy_version: int
    """The published version that made all of it."""
    choices: list[ChatChoice]
    usage: Usage


class TextAnswer(BaseModel):
    """What a completion request is answered with."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    policy_version: int
    """The published version that made all of it."""
    choices: list[TextChoice]
    usage: Usage


class ServedModel(BaseModel):
    """A model that answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rlhf-ray"] = "rlhf-ray"
    kind: str
    version: int
    sha256: str


class ServedModels(BaseModel):
    """All that answer now."""

    object: Literal["list"] = "list"
    data: list[ServedModel]
