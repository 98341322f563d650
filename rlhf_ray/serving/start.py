"""`rlhf serve`: a run's models into the registry, Ray Serve up, and down again when it is asked to stop."""

import getpass
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DeadlineExceeded, InfrastructureError, InputError, Interrupted
from rlhf_ray.feedback.databases import is_postgres
from rlhf_ray.models.files import check_cpu_attention
from rlhf_ray.models.registry import Kind, Registry, Version
from rlhf_ray.roles.joining import join
from rlhf_ray.serving.settings import ServiceConfig
from rlhf_ray.sqlite import file_of
from rlhf_ray.training.lineage import lineage_of
from rlhf_ray.training.run_folder import existing_run
from rlhf_ray.training.stopping import Stopping

Say = Callable[[str], None]
READY_WITHIN_S = 600.0
REQUEST_TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.5
APP = "rlhf"
PART_KINDS: dict[str, Kind] = {"policy": "policy", "reward": "reward_model"}


def publish_run(run: Path, registry: Registry, *, by: str) -> dict[Kind, Version]:
    """A run's models as versions, new ones where they are not there yet; each knows its lineage."""
    folder, _ = existing_run(run)
    if not folder.policy.is_dir():
        raise InputError(f"{run} has no policy yet: run its command again until it is done")
    published: dict[Kind, Version] = {}
    if folder.reward_model.is_dir():
        published["reward_model"] = registry.publish("reward_model", folder.reward_model, lineage=lineage_of(run))
    judge = published.get("reward_model")
    lineage = lineage_of(run, reward_model_version=judge.number if judge else None)
    published["policy"] = registry.publish("policy", folder.policy, lineage={**lineage, "published_by": by})
    return published


def promote_first(registry: Registry, published: dict[Kind, Version], *, by: str) -> None:
    """Promotes what was published where nothing of its kind is promoted, and it is good enough."""
    for kind, version in published.items():
        if registry.promoted(kind) is None and not version.not_good_enough:
            registry.promote(kind, version.number, by=by, reason="the first of its kind")


def prepare(run: Path | None, config: ServiceConfig, *, say: Say) -> None:
    """The registry as the service will find it; `InputError` where it holds nothing to serve."""
    for url in (config.store, config.keys):
        if not is_postgres(url):
            file_of(url, what="files").parent.mkdir(parents=True, exist_ok=True)
    registry = Registry(config.registry)
    if run is not None:
        published = publish_run(run, registry, by=whoami())
        promote_first(registry, published, by=whoami())
        for kind, version in published.items():
            promoted = registry.promoted(kind)
            if promoted is None:
                state = f"published and not promoted, for {version.not_good_enough}"
            else:
                state = "served" if promoted.number == version.number else f"published; {promoted.number} is served"
            if kind not in {PART_KINDS[part] for part in config.parts if part in PART_KINDS}:
                state = "published"
            say(f"{kind.replace('_', ' ')} {version.number}: {state}")
    for part, kind in PART_KINDS.items():
        if part in config.parts and registry.promoted(kind) is None:
            raise InputError(
                f"no {kind.replace('_', ' ')} is promoted in {config.registry}: `rlhf policies promote` one "
                f"(with --force where it is not good enough), give a run that has one, or leave {part} out of parts"
            )
    if "policy" in config.parts and config.policy.gpus == 0:
        served = registry.promoted("policy")
        assert served is not None
        check_cpu_attention(served.folder)
    registry.close()


@contextmanager
def serving(config: ServiceConfig, *, address: str | None, say: Say) -> Iterator[Stopping]:
    """The service, up on a local Ray or on the cluster at `address`, down again at the end.

    In here SIGINT and SIGTERM are only noted, in what is yielded; one that came while it started is there already.
    """
    refuse_taken(config.host, config.port)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    from rlhf_ray.serving.app import application

    bound = application(config)
    stopping = Stopping()
    with stopping.listening():
        if address:
            join(address)
        else:
            start_here(seats(config))
        stopping.listen_again()  # Ray has taken SIGTERM
        try:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            http = {"host": config.host, "port": config.port, "request_timeout_s": REQUEST_TIMEOUT_S}
            serve.start(http_options=http)
            say("starting: vLLM takes half a minute or more")
            # not serve.run, which waits for ever
            serve.run_many([serve.RunTarget(bound, name=APP, route_prefix="/")], wait_for_applications_running=False)
            with stopping.graceful():
                wait_running(serve, stopping, say=say)
                yield stopping
            say("stopping: answers under way are finished first")
            take_down(serve, everything=address is not None, say=say)
        finally:
            ray.shutdown()


def start_here(wanted: int) -> None:
    """A Ray of our own on this machine, with room for so many seats."""
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, wanted),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Interrupted:
        raise
    except Exception as error:  # a bare one is what Ray raises where a node does not come up in time
        raise InfrastructureError(f"Ray did not start: {error}; is the machine overloaded? Try again") from error


def serve_until_stopped(config: ServiceConfig, *, address: str | None, say: Say) -> None:
    """Serves until SIGINT or SIGTERM."""
    with serving(config, address=address, say=say) as stopping:
        if not stopping.asked:
            say(where_to_ask(config))
        while not stopping.asked:
            time.sleep(LOOK_EVERY_S)


def take_down(serve: Any, *, everything: bool, say: Say) -> None:
    """Ends the replicas, each after its answers; `everything`: Serve itself too, where Ray goes on without us.

    Where Ray ends as well, Serve goes with it: asked to stop by itself, it would print an error of its own making.
    """
    try:
        serve.delete(APP)
    except TimeoutError:  # after a minute; Serve's
        say("some answers were cut off: they were not finished within a minute")
    if everything:
        serve.shutdown()


def wait_running(serve: Any, stopping: Stopping, *, say: Say, within_s: float = READY_WITHIN_S) -> None:
    """Returns once every deployment is healthy, or stopping was asked for; raises with Serve's word where one fails."""
    end = time.monotonic() + within_s
    while not stopping.asked:
        status = serve.status().applications.get(APP)
        if status is not None and status.status == "RUNNING":
            return
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            told = [f"{name}: {one.message}" for name, one in status.deployments.items() if one.message]
            raise InfrastructureError(f"the service did not start: {'; '.join([status.message, *told])[-2000:]}")
        if time.monotonic() > end:
            raise DeadlineExceeded(f"the service was not up after {within_s:g} s; see /tmp/ray/session_latest/logs")
        time.sleep(LOOK_EVERY_S)


def seats(config: ServiceConfig) -> int:
    """CPUs that the replicas ask Ray for: seats, not cores, on one machine."""
    policy, reward = config.policy, config.reward
    wanted = 2.0  # doors, the writer, the registry's voice, Serve itself
    if "policy" in config.parts:
        wanted += (policy.max_replicas or policy.replicas) * policy.threads
    if "reward" in config.parts:
        wanted += (reward.max_replicas or reward.replicas) * reward.threads
    return int(wanted + 0.1 * config.doors)


def refuse_taken(host: str, port: int) -> None:
    """`InputError` where something listens on the port already: Serve would say so only in a log."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host} port {port} ({error.strerror}): give another --port") from None


def where_to_ask(config: ServiceConfig) -> str:
    """What a person does next."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    base = f"http://{host}:{config.port}"
    lines = [f"serving on {base}; Ctrl-C stops it"]
    if "policy" in config.parts:
        lines.append(
            f'  ask      curl {base}/v1/chat/completions -H "Content-Type: application/json" '
            """-d '{"model": "policy", "messages": [{"role": "user", "content": "Hello"}]}'"""
        )
    lines.append(f"  ready?   {base}/readyz")
    lines.append(f"  routes   {base}/docs" if config.on_loopback else f"  routes   {base}/openapi.json")
    return "\n".join(lines)


def whoami() -> str:
    """The name of who promotes from a shell."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in the container's files
        return "unknown"
