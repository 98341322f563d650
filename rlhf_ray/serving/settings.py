"""What a service can be told: the `args` of a Serve config, the options of `rlhf serve`. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config import Count, Positive, Section, apply_overrides, parse_section
from rlhf_ray.feedback.schema import NextBy

Part = Literal["policy", "reward", "feedback"]


class PolicySettings(Section):
    """How prompts are answered: replicas, each a whole vLLM engine."""

    replicas: Count = 1
    """Engines to start with."""
    max_replicas: Count | None = None
    """Where it is above `replicas`, load adds replicas up to it."""
    context: Count | None = None
    """Longest prompt plus answer, in tokens; by default the model's own."""
    kv_cache_mib: Count = 256
    """Memory for one engine's cache of keys and values."""
    threads: Count = 1
    """CPU cores of a replica."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of a replica; 0: it runs on CPU."""
    max_tokens: Count = 1024
    """Most tokens that one answer may ask for."""
    max_choices: Annotated[int, Field(ge=1, le=8)] = 8
    """Most answers that one request may ask for (`n`)."""
    max_ongoing: Count = 32
    """Requests that one replica works on at a time."""
    max_queued: Count = 64
    """Requests that wait for a replica; more are refused with 503 and Retry-After."""
    deadline_s: Positive = 120
    """One answer, first token to last."""
    swap_deadline_s: Positive = 120
    """Draining, loading and the canary of one replica that takes another version."""


class RewardSettings(Section):
    """How answers are scored."""

    replicas: Count = 1
    """Reward models to start with."""
    max_replicas: Count | None = None
    """Where it is above `replicas`, load adds replicas up to it."""
    threads: Count = 1
    """CPU cores of a replica."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of a replica; 0: it runs on CPU."""
    max_items: Count = 64
    """Answers that one request may bring."""
    batch: Count = 64
    """Answers, of any number of requests, that go to a replica in one call and are scored together."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.005
    """How long a batch that is not full waits for more."""
    max_queued: Count = 4096
    """Answers that wait for their call to a replica; more are refused with 503 and Retry-After."""
    deadline_s: Positive = 30
    """One request, its wait for a batch included."""


class LimitSettings(Section):
    """What one key may ask for, and how large a request may be. They hold for each replica of the door."""

    requests_per_minute: Count = 6000
    """Of one key, in any 60 seconds."""
    concurrent: Count = 64
    """Requests of one key under way at a time."""
    body_bytes: Count = 1 << 20
    """The cap for all other bodies."""
    feedback_bytes: Count = 256 << 10
    """The cap for bodies under /v1/feedback."""
    json_depth: Count = 32
    """Deepest nesting of a body."""
    body_deadline_s: Positive = 10
    """How long a body may take to arrive."""


class LabellingSettings(Section):
    """The queue of tasks for annotators."""

    next: NextBy = "random"
    """What is asked next: `random`; `newest`: answers of the newest policy; `disagreement`: the highest priority."""
    lease_minutes: Positive = 30
    """How long who is shown a task holds it before it is offered to others."""


class ServiceConfig(Section):
    """A whole service."""

    registry: Path = Path("service/registry")
    """Folder of the published versions; on a cluster, on a disk that every node sees."""
    store: str = "service/feedback.db"
    """Feedback and kept completions: `sqlite:///folder/feedback.db`, its path, or `postgresql://user@host/name`."""
    keys: str = "service/keys.db"
    """The keys: `sqlite:///folder/keys.db`, or its path."""
    host: str = "127.0.0.1"
    """Where the service listens. Anything but loopback is refused while there are no keys."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """The door's port."""
    hosts: tuple[str, ...] = ()
    """Names under which callers reach the service, besides loopback's and `host` (the Host header is checked)."""
    parts: Annotated[frozenset[Part], Field(min_length=1)] = frozenset({"policy", "reward", "feedback"})
    """What is served; the routes of the rest are absent."""
    doors: Count = 1
    """Replicas of the HTTP door."""
    policy: PolicySettings = PolicySettings()
    reward: RewardSettings = RewardSettings()
    limits: LimitSettings = LimitSettings()
    labelling: LabellingSettings = LabellingSettings()
    retention_days: Positive = 30
    """How long served answers are kept, so that feedback can name them."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ServiceConfig":
        for name, section in (("policy", self.policy), ("reward", self.reward)):
            if section.max_replicas is not None and section.max_replicas < section.replicas:
                raise ValueError(f"{name}.max_replicas={section.max_replicas} is below {name}.replicas")
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    @property
    def trusted_hosts(self) -> frozenset[str]:
        """Names that a request may give as its host."""
        return frozenset({"127.0.0.1", "localhost", "::1", self.host, *self.hosts})


def is_loopback(host: str) -> bool:
    """Whether an address or name leads to this machine only; a name other than localhost is taken to lead out."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def service_config(args: dict[str, Any]) -> ServiceConfig:
    """The settings of a Serve config's `args`; `ConfigError` names the key at fault and the nearest known one."""
    return parse_section(ServiceConfig, args, source="of the service")


def config_of(options: Mapping[str, Any], overrides: Sequence[str]) -> ServiceConfig:
    """The settings of command-line options and `dotted.key=value` overrides, its files named from the root."""
    tree = dict(options)
    apply_overrides(tree, overrides)
    config = service_config(tree)
    files = {name: _from_root(str(getattr(config, name))) for name in ("registry", "store", "keys")}
    return service_config({**tree, **files})


def _from_root(place: str) -> str:
    """Replicas start in folders of their own, where a relative path leads elsewhere."""
    scheme, path = ("sqlite:///", place[10:]) if place.startswith("sqlite:///") else ("", place)
    return place if ":" in path else f"{scheme}{Path(path).absolute()}"
