"""Runs as Ray jobs: packed, submitted with a token, followed, stopped so that they save, and submitted again to resume.

What travels is the resolved config, the cluster's own config where one is named, and this package (so that the cluster
runs the code that submitted it); never data or runs, which must lie on storage that every node sees.
"""

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import rlhf_ray
from rlhf_ray.clusters import DASHBOARD_PORT, knock, token_refusals_explained
from rlhf_ray.config import Config, dump_config
from rlhf_ray.errors import ConfigError, InfrastructureError, InputError, Interrupted
from rlhf_ray.roles.joining import use_token

DEFAULT_ADDRESS = f"http://127.0.0.1:{DASHBOARD_PORT}"
REQUEST_S = 30
STOP_WITHIN_S = 120
"""Seconds that a stopped run has to finish its step and save, before Ray kills it."""
POLL_S = 0.5
RUN_FILE, CLUSTER_FILE = "run.yaml", "cluster.yaml"
OVER = {"SUCCEEDED", "FAILED", "STOPPED"}
RESUMES = "the same command resumes"
"""What a run says last when it was stopped and has saved (`training/loop.py`, `training/stopping.py`)."""
STOPPED_CODE = 143


class Jobs(Protocol):
    """What is used of Ray's `JobSubmissionClient`."""

    def submit_job(self, *, entrypoint: str, **options: Any) -> str: ...  # noqa: D102
    def stop_job(self, job_id: str) -> bool: ...  # noqa: D102
    def get_job_info(self, job_id: str) -> Any: ...  # noqa: D102
    def list_jobs(self) -> list[Any]: ...  # noqa: D102
    def get_job_logs(self, job_id: str) -> str: ...  # noqa: D102
    def tail_job_logs(self, job_id: str) -> Any: ...  # noqa: D102


def address_of(given: str | None) -> str:
    """The dashboard to talk to: the one given, Ray's own variables, or this machine's."""
    found = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    if not found.startswith(("http://", "https://")):
        raise InputError(f"{found} is not a dashboard's address: give --address http://HOST:{DASHBOARD_PORT}")
    return found.rstrip("/")


def connect(address: str) -> Jobs:
    """A client for a cluster's jobs; every one of its requests has a deadline.

    Raises `InfrastructureError` where nobody answers and `ConfigError` where the token is missing or wrong.
    """
    parts = urlsplit(address)
    knock(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), address)
    use_token()
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets its variables win over what it is given
    import requests
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super()._do_request(*args, **{"timeout": REQUEST_S, **kwargs})
            except requests.RequestException as error:
                raise InfrastructureError(f"no answer from {address}: {type(error).__name__}") from None

        def _raise_error(self, response: Any) -> None:
            if response.status_code == 404:
                raise InputError(f"{response.text.strip()}; `rlhf jobs list` names those that do")
            super()._raise_error(response)

    with token_refusals_explained(address):
        try:
            client: Jobs = Client(address)
        except (ConnectionError, RuntimeError) as error:
            raise InfrastructureError(f"the Ray cluster at {address} does not take jobs: {error}") from None
    return client


def submit(config: Config, *, client: Jobs, stop_within_s: int = STOP_WITHIN_S) -> str:
    """Hands a run to the cluster and returns the job's id. The same run submitted again resumes.

    Raises `ConfigError` for a path that would mean nothing where the job runs.
    """
    check_paths(config)
    with tempfile.TemporaryDirectory(prefix="rlhf-job-") as folder:
        pack(config, Path(folder))
        return client.submit_job(
            entrypoint=f"exec python -m rlhf_ray.cli run -c {RUN_FILE}",
            submission_id=f"{config.run.id}-{secrets.token_hex(3)}",
            metadata={"rlhf_run": str(config.run.id)},
            runtime_env={
                "working_dir": folder,
                "py_modules": [str(Path(rlhf_ray.__file__).parent)],
                "excludes": ["__pycache__", "*.pyc"],
                # read by the job's supervisor; by default Ray kills three seconds after it has asked to stop
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_within_s)},
            },
        )


def pack(config: Config, folder: Path) -> None:
    """Writes what a job needs of this machine into a folder: its config, told to join the cluster that runs it."""
    resources = config.resources.model_copy(update={"address": "auto"})
    if resources.cluster is not None:
        (folder / CLUSTER_FILE).write_bytes(resources.cluster.read_bytes())
        resources = resources.model_copy(update={"cluster": Path(CLUSTER_FILE)})
    travelling = config.model_copy(update={"resources": resources})
    (folder / RUN_FILE).write_text(dump_config(travelling), encoding="utf-8")


def check_paths(config: Config) -> None:
    """Refuses relative paths: a job works in a temporary folder, where they would lead nowhere or be thrown away."""
    if config.run.id is None:
        raise ConfigError("the run has no name: give a config file, or set run.id")
    store = config.feedback.store
    if store is not None and "://" in store:
        scheme, _, rest = store.partition("://")
        store = rest.removeprefix("/") if scheme.startswith("sqlite") else None
    paths = {
        "run.root": config.run.root,
        "run.from": config.run.from_,
        "data.path": config.data.path,
        "model.path": config.model.path,
        "reward_model.path": config.reward_model.path,
        "feedback.store": Path(store) if store is not None else None,
    }
    relative = {key: path for key, path in paths.items() if path is not None and not path.is_absolute()}
    if relative:
        said = ", ".join(f"{key}={path}" for key, path in relative.items())
        key, path = next(iter(relative.items()))
        raise ConfigError(
            f"{said}: a job runs in a temporary folder of the cluster; give the full path on storage that every node "
            f"sees, such as {key}=/shared/{path.name}"
        )


def follow(job: str, *, client: Jobs, show: Callable[[str], None]) -> int:
    """Shows a job's log as it grows, until the job is over; returns the run's exit code.

    A connection that breaks is made again, and goes on where it left off.
    """
    shown = 0
    while True:
        shown = asyncio.run(_tail(job, client, show, shown))
        if client.get_job_info(job).status in OVER:
            show(client.get_job_logs(job)[shown:])
            return exit_code(job, client=client)
        time.sleep(POLL_S)


def stop(job: str, *, client: Jobs, within_s: float = STOP_WITHIN_S) -> str:
    """Asks a run to stop, waits for it to save, and says what came of it.

    Raises `InfrastructureError` where it is still running after the time that it has.
    """
    info = client.get_job_info(job)
    if info.status in OVER:
        return f"{job} was over already: {info.status}"
    client.stop_job(job)
    end = time.monotonic() + within_s + REQUEST_S
    while client.get_job_info(job).status not in OVER:
        if time.monotonic() > end:
            raise InfrastructureError(f"{job} was asked to stop and still runs after {within_s:g} s: look at its log")
        time.sleep(POLL_S)
    return last_words(job, client=client)


def listing(client: Jobs) -> list[str]:
    """A line for each job, the newest first."""
    lines = [f"{'job':<40}{'run':<24}{'state':<12}started"]
    for info in sorted(client.list_jobs(), key=lambda info: info.start_time or 0, reverse=True):
        if info.submission_id is not None:  # the others are drivers that joined by themselves
            run = (info.metadata or {}).get("rlhf_run", "-")
            lines.append(f"{info.submission_id:<40}{run:<24}{info.status:<12}{_clock(info.start_time)}")
    return lines


def status(job: str, *, client: Jobs) -> str:
    """One line on how a job stands."""
    info = client.get_job_info(job)
    if info.status in OVER:
        return last_words(job, client=client)
    return f"{job} is {str(info.status).lower()} since {_clock(info.start_time)}"


def exit_code(job: str, *, client: Jobs) -> int:
    """The run's own exit code, as its shell would have seen it."""
    info = client.get_job_info(job)
    if info.status == "STOPPED":
        return STOPPED_CODE
    code: int | None = info.driver_exit_code
    if code is None:  # it never came to run: its environment could not be made, or its node died
        return 0 if info.status == "SUCCEEDED" else InfrastructureError.exit_code
    return code if code >= 0 else 128 - code


def last_words(job: str, *, client: Jobs) -> str:
    """One line on how a job that is over has ended."""
    info = client.get_job_info(job)
    said = next((line for line in reversed(client.get_job_logs(job).splitlines()) if line.strip()), "")
    if info.status == "SUCCEEDED":
        return f"{job} is done"
    if info.status == "STOPPED":
        if RESUMES in said:
            return f"{job}: {said.removeprefix(f'{Interrupted.__name__}: ')} (exit {STOPPED_CODE})"
        return f"{job} was killed before it could save; submitted again it resumes from its last checkpoint"
    return f"{job} failed with exit code {exit_code(job, client=client)}: {said or info.message}"


def _clock(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "-"
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat(sep=" ", timespec="seconds")


async def _tail(job: str, client: Jobs, show: Callable[[str], None], shown: int) -> int:
    """Shows what comes after the first `shown` characters; returns how many there were when the line broke off."""
    import aiohttp

    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            show(text[max(0, shown - seen) :])
            seen += len(text)
    except (RuntimeError, aiohttp.ClientError):
        pass
    return max(seen, shown)
