"""A whole service on Ray Serve, started by this process, and how to ask it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import ray
from ray import serve

from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.app import application
from rlhf_ray.serving.auth import KeyStore
from rlhf_ray.serving.settings import ServiceConfig
from rlhf_ray.serving.start import seats
from tests.on_serve.taught import TOKENS


@dataclass
class Running:
    """A service that answers."""

    url: str
    key: str
    """An admin's."""
    registry: Registry
    store: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

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

    def rows(self) -> int:
        """Judgements on disk."""
        with FeedbackStore(self.store, read_only=True) as store:
            return store.count()


@contextmanager
def running(root: Path, registry: Registry, **settings: Any) -> Iterator[Running]:
    """The service over what `registry` has promoted, its other files under `root`."""
    files = {"registry": registry.root, "store": str(root / "feedback.db"), "keys": str(root / "keys.db")}
    config = ServiceConfig(**files, port=free_port(), **settings)
    key = KeyStore(config.keys).create("test", "admin")
    ray.init(num_cpus=seats(config), include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application(config), name="test")
        yield Running(f"http://{config.host}:{config.port}", key, registry, config.store)
        serve.shutdown()
    finally:
        ray.shutdown()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
