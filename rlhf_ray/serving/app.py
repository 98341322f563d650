"""The service on Ray Serve: what is deployed, how often and with what, and who is handed whose handle.

    Door --> PolicyDeployment --> VersionsDeployment   (asked twice a second: stay, or swap)
         --> RewardDeployment
         --> RecordsDeployment    exactly one: the one writer
         --> VersionsDeployment   exactly one: the registry's voice

`build` is what a Serve config names: `import_path: rlhf_ray.serving.app:build`, with a `ServiceConfig` as its `args`.
Here alone Serve is applied to classes; what they do is written, and tested without Serve, in the other files.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter

from rlhf_ray.errors import ConfigError, InfrastructureError, InputError
from rlhf_ray.feedback.databases import is_postgres
from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.auth import KeyStore
from rlhf_ray.serving.backends import Delta, GenerateCall, Readiness, ScoreItem, Scores
from rlhf_ray.serving.door import create_door
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.handles import PolicyHandle, RecordsHandle, RewardHandle, VersionsHandle
from rlhf_ray.serving.records import Records
from rlhf_ray.serving.settings import PolicySettings, RewardSettings, ServiceConfig, service_config
from rlhf_ray.serving.versions import Versions
from rlhf_ray.sqlite import file_of

CALLS_A_REPLICA = 2
"""That a door has under way: one is scored while the next is on its way."""
QUIET = {"enable_access_log": False}
"""Serve's proxy logs each request already; a line more at every replica on its way costs a tenth of the throughput."""
LOOK_EVERY_S = 1.0
"""How often a reward replica looks whether another version is promoted."""


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config's `args`."""
    return application(service_config(args))


def application(config: ServiceConfig) -> Application:
    """The whole service, bound; `InputError` where it would be open to strangers or would not find its files."""
    refuse_unsafe(config)
    parts: dict[str, Application] = {}
    if "policy" in config.parts:
        # prepare, load and prove, go back, each within the swap deadline; drain; and some slack
        lease_s = 3 * config.policy.swap_deadline_s + config.policy.deadline_s + 10
        parts["versions"] = _one(VersionsDeployment).bind(config.registry, lease_s=lease_s)
        policy = _many(
            PolicyDeployment,
            config.policy,
            target=max(1, config.policy.max_ongoing // 2),
            max_ongoing_requests=config.policy.max_ongoing,
            max_queued_requests=config.policy.max_queued,
        )
        parts["policy"] = policy.bind(config.policy, parts["versions"])
    if "reward" in config.parts:
        # A call carries what many asked for, so one that is always under way is work for a whole replica. The rest is
        # room for those who ask whether it is ready.
        calls = CALLS_A_REPLICA * config.doors + 8
        reward = _many(RewardDeployment, config.reward, target=1, max_ongoing_requests=calls)
        parts["reward"] = reward.bind(config.reward, config.registry)
    if "feedback" in config.parts:
        parts["records"] = _one(RecordsDeployment).bind(config.store, retention_days=config.retention_days)
    door = serve.deployment(
        serve.ingress()(Door),
        name="Door",
        num_replicas=config.doors,
        max_ongoing_requests=1024,  # how many each key may have under way is the door's own to say
        ray_actor_options={"num_cpus": 0.1},
        logging_config=QUIET,
    )
    return door.bind(config, **parts)


def refuse_unsafe(config: ServiceConfig) -> None:
    """Raises where anybody could ask without a key, or where a replica would look for its files in another place."""
    keys = file_of(config.keys, what="keys")
    files = {"registry": config.registry, "keys": keys}
    if not is_postgres(config.store):
        files["store"] = file_of(config.store, what="feedback and completions")
    for name, path in files.items():
        if not path.is_absolute():
            raise ConfigError(f"{name}: {path} is relative, and replicas start in folders of their own: give it from /")
    if not config.on_loopback and not (keys.exists() and KeyStore(keys).any()):
        raise InputError(
            f"without keys a service listens on this machine only, not on {config.host}: make one with "
            f"`rlhf keys create NAME --role admin --keys {keys}`, or leave the host out"
        )


class Door:
    """The ingress: no torch and no model, only checks and routes."""

    def __init__(self, config: ServiceConfig, **parts: DeploymentHandle) -> None:
        self.config = config
        self.parts = parts
        self.events = Counter("rlhf_door_events", "Refusals by status, failures by name.", tag_keys=("event",))

    async def __serve_build_asgi_app__(self) -> FastAPI:
        config, parts = self.config, self.parts
        # a replica may hold a call at its gate while it swaps, so the wait here is longer than an answer's
        waits_s = 2 * config.policy.deadline_s
        keys = KeyStore(config.keys)
        return create_door(
            config,
            policy=PolicyHandle(parts["policy"], deadline_s=waits_s) if "policy" in parts else None,
            reward=_reward_handle(parts["reward"], config.reward) if "reward" in parts else None,
            records=RecordsHandle(parts["records"]) if "records" in parts else None,
            versions=VersionsHandle(parts["versions"]) if "versions" in parts else None,
            keys=keys,
            desk=keys,
            count=lambda name: self.events.inc(tags={"event": name}),
        )


class PolicyDeployment:
    """A policy replica that starts with the version that is wanted and asks for its turns."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: PolicySettings, versions: DeploymentHandle
    ) -> None:
        from rlhf_ray.serving.engine import VllmServingEngine
        from rlhf_ray.serving.policy import PolicyReplica, first_version

        desk = VersionsHandle(versions)
        version = await first_version(desk)
        engine = partial(_engine, VllmServingEngine, settings)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = await asyncio.to_thread(PolicyReplica, version, engine, settings, name=name)
        await self._replica.start()
        self._following = asyncio.create_task(self._replica.follow(desk))

    async def generate(self, call: GenerateCall) -> AsyncIterator[Delta]:
        """The answers as they grow."""
        async for delta in self._replica.generate(call):
            yield delta

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces the replica where this raises."""
        _still_runs(self._following, "asking for turns")
        await self._replica.check_health()

    async def __del__(self) -> None:
        self._following.cancel()
        self._replica.close()


class RewardDeployment:
    """A reward-model replica that takes the promoted version, at its start and whenever it changes."""

    async def __init__(self, settings: RewardSettings, registry: Path) -> None:  # type: ignore[misc] # Serve awaits it
        from rlhf_ray.serving.reward import RewardReplica

        self._registry = Registry(registry)
        version = self._registry.promoted("reward_model")
        if version is None:
            raise ConfigError("no reward model is promoted: rlhf policies promote NUMBER --kind reward_model")
        await asyncio.to_thread(self._registry.verify, version)
        self._replica = await asyncio.to_thread(
            RewardReplica,
            version.folder,
            version=version.number,
            batch=settings.batch,
            batch_wait_s=settings.batch_wait_s,
            deadline_s=settings.deadline_s,
            threads=settings.threads,
        )
        self._following = asyncio.create_task(self._follow())

    async def score_each(self, requests: list[list[ScoreItem]]) -> list[Scores | ApiError]:
        """One reward an item, for each of several requests."""
        return await self._replica.score_each(requests)

    async def ready(self) -> Readiness:
        """What it holds."""
        return await self._replica.ready()

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces the replica where this raises."""
        _still_runs(self._following, "looking for promotions")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            wanted = await asyncio.to_thread(self._registry.promoted, "reward_model")
            if wanted is None or wanted.number == self._replica.version:
                continue
            try:
                await asyncio.to_thread(self._registry.verify, wanted)
                await self._replica.load(wanted.folder, wanted.number)
            except InputError as error:
                self._registry.fail("reward_model", wanted.number, reason=str(error))

    async def __del__(self) -> None:
        self._following.cancel()


class RecordsDeployment(Records):
    """The one writer; made in its replica's event loop."""

    async def __init__(self, store: str, *, retention_days: float) -> None:  # type: ignore[misc] # Serve awaits it
        await asyncio.to_thread(super().__init__, store, retention_days=retention_days)

    async def __del__(self) -> None:
        await self.close()


class VersionsDeployment(Versions):
    """The registry's voice, opened in its replica."""

    def __init__(self, registry: Path, *, lease_s: float) -> None:
        super().__init__(Registry(registry), lease_s=lease_s)


def _reward_handle(replicas: DeploymentHandle, settings: RewardSettings) -> RewardHandle:
    calls = CALLS_A_REPLICA * (settings.max_replicas or settings.replicas)
    return RewardHandle(
        replicas, deadline_s=settings.deadline_s, calls=calls, batch=settings.batch, queue=settings.max_queued
    )


def _one(cls: type) -> Deployment:
    """Exactly one replica: a second would be a second writer, or a second opinion."""
    return serve.deployment(
        cls,
        name=cls.__name__,
        num_replicas=1,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=2,
        logging_config=QUIET,
    )


def _many(cls: type, settings: PolicySettings | RewardSettings, *, target: float, **queues: int) -> Deployment:
    """Replicas by the load, where that is allowed: so many that each has `target` calls under way."""
    scaled: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None and settings.max_replicas > settings.replicas:
        scaled = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": target,
            }
        }
    return serve.deployment(
        cls,
        name=cls.__name__,
        **scaled,
        **queues,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.deadline_s,
        logging_config=QUIET,
        ray_actor_options={
            "num_cpus": settings.threads,
            "num_gpus": settings.gpus,
            # read when torch and vLLM start, and not again
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}},
        },
    )


def _engine(engine: Any, settings: PolicySettings, folder: Path, context: int) -> Any:
    return engine(folder, context=context, kv_cache_mib=settings.kv_cache_mib, on_gpu=settings.gpus > 0)


def _still_runs(task: "asyncio.Task[None]", doing: str) -> None:
    if task.done():
        raise InfrastructureError(f"{doing} has ended ({task}): the replica has to be replaced")
