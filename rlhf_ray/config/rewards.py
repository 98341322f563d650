"""Where a rollout's reward comes from."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf_ray.config.section import Count, Name, Positive, Section

RUBRIC = (
    "You judge how well an assistant answers a user. Consider whether the last answer is correct, helpful, to the "
    "point and polite."
)


class _Source(Section):
    weight: float = 1.0
    """What its reward is multiplied by before all are summed."""


class ModelReward(_Source):
    """A reward model, or an ensemble of them, in the scorers' own memory."""

    kind: Literal["model"]
    """A sequence classifier with one label."""
    paths: tuple[Path, ...] = ()
    """Folders, each with all members that it has, together an ensemble; by default the run's own reward model."""
    uncertainty: Annotated[float, Field(ge=0)] = 0.0
    """The reward is the members' mean less this times their variance (Coste et al., arXiv:2310.02743), or that of its
    heads for a single model (`reward_model.ensemble`)."""


class FunctionReward(_Source):
    """A Python function of the user's."""

    kind: Literal["function"]
    """Called as TRL calls its reward functions, with `prompts` and `completions` as lists of messages."""
    of: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:function`, importable where the scorers run. It returns a number for each completion, or None."""


class EnvironmentReward(_Source):
    """What `rollout.environment` gives a whole dialogue."""

    kind: Literal["environment"]
    """A dialogue for which it gives None has no reward."""


class _Service(_Source):
    """Anything that is asked over HTTP."""

    url: str
    """Where it answers; http or https, and never taken from a request."""
    key_env: str | None = None
    """Environment variable of the command that holds the bearer key; a key itself does not belong in a config."""
    concurrency: Count = 8
    """Requests under way at a time, of each scorer."""
    deadline_s: Positive = 30
    """Of one request."""
    patience_s: Positive = 120
    """Of a batch with all its retries; what has no reward by then has none."""

    @field_validator("url")
    @classmethod
    def _is_a_service(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an http or https address with a host")
        if parts.username or parts.password:
            raise ValueError("a key in the address would be written into logs and configs: set key_env")
        try:
            link_local = ipaddress.ip_address(parts.hostname).is_link_local
        except ValueError:
            link_local = False
        if link_local:
            raise ValueError(f"{parts.hostname} is link-local, where clouds keep their machines' secrets")
        return url.rstrip("/")


class JudgeReward(_Service):
    """A language model as judge, through any address that speaks OpenAI's chat completions."""

    kind: Literal["judge"]
    """Its reward is the mark that it gives, from 0 (worst) to 1."""
    model: str
    """The model's name there."""
    rubric: str = RUBRIC
    """What it is told to judge by; the dialogue follows as JSON."""
    marks: tuple[int, int] = (1, 10)
    """The worst and the best mark."""
    max_tokens: Count = 512
    """Of its reply, whose last line is the mark."""

    @field_validator("marks")
    @classmethod
    def _in_order(cls, marks: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= marks[0] < marks[1]:
            raise ValueError("the worst mark, then a higher best one, neither negative")
        return marks


class RemoteReward(_Service):
    """A reward model behind HTTP."""

    kind: Literal["remote"]
    """This project's service, or any that speaks OpenRLHF's `/get_reward`."""
    shape: Literal["openrlhf", "rewards"] = "openrlhf"
    """`openrlhf`: `query` and `prompts` as text, many in a request; `rewards`: this project's `/v1/rewards`."""
    batch: Count = 32
    """Answers in one request, at most."""


Source = Annotated[
    ModelReward | FunctionReward | EnvironmentReward | JudgeReward | RemoteReward, Field(discriminator="kind")
]


OWN = "reward_model"
"""The source there is where none is named, which is a model."""


def _own_model() -> dict[str, Source]:
    return {OWN: ModelReward(kind="model")}


class RewardsConfig(Section):
    """What a rollout earns: the weighted sum of all sources. A rollout without a reward from each of them has none."""

    sources: dict[Name, Source] = Field(default_factory=_own_model, min_length=1)
    """By name. Giving any replaces the default, which is the run's own reward model."""
    replacements: Count = 3
    """How often in a step prompts left without a reward make room for others, before the step fails."""

    @field_validator("sources", mode="before")
    @classmethod
    def _own_model_is_known(cls, sources: Any) -> Any:
        """So that `rewards.sources.reward_model.uncertainty=1` changes the default source."""
        own = sources.get(OWN) if isinstance(sources, dict) else None
        return {**sources, OWN: {"kind": "model", **own}} if isinstance(own, dict) else sources

    @property
    def own_model(self) -> bool:
        """Whether the run's own reward model is one of them."""
        return any(source.kind == "model" and not source.paths for source in self.sources.values())

    @property
    def own_model_alone(self) -> bool:
        """Whether it is the only one."""
        return self.own_model and len(self.sources) == 1

    def services(self) -> dict[str, Any]:
        """Those that are asked over HTTP, by name."""
        return {name: source for name, source in self.sources.items() if isinstance(source, _Service)}
