"""A run as a job: what travels, how it is followed, stopped and told, against a client that keeps a diary."""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray import jobs
from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError, InfrastructureError, InputError

SAVED = "Interrupted: stopped on SIGTERM; saved step 4; the same command resumes\n"


@dataclass
class Info:
    status: str
    driver_exit_code: int | None = None
    message: str = "Job failed."
    submission_id: str | None = "demo-1"
    metadata: dict[str, str] | None = None
    start_time: int | None = 1_700_000_000_000


@dataclass
class FakeJobs:
    """Answers with the given states, one a question, the last one for ever; tells its log in the given pieces."""

    states: list[Info]
    pieces: list[str | Exception] = field(default_factory=list)
    log: str = ""
    submitted: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    def submit_job(self, **options: Any) -> str:
        self.submitted = options
        folder = Path(options["runtime_env"]["working_dir"])
        self.files = {path.name: path.read_text() for path in folder.rglob("*")}
        return str(options["submission_id"])

    def get_job_info(self, job_id: str) -> Info:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def list_jobs(self) -> list[Info]:
        return self.states

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        while self.pieces:
            piece = self.pieces.pop(0)
            if isinstance(piece, Exception):
                raise piece
            yield piece


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_S", 0.0)


def run_config(*overrides: str) -> Config:
    return load_config(None, ["run.id=demo", "run.root=/shared/runs", *overrides])


def submitted(*overrides: str) -> FakeJobs:
    client = FakeJobs([Info("PENDING")])
    jobs.submit(run_config(*overrides), client=client, stop_within_s=45)
    return client


def follow(client: FakeJobs) -> tuple[int, str]:
    shown: list[str] = []
    return jobs.follow("demo-1", client=client, show=shown.append), "".join(shown)


def test_the_config_travels_with_its_overrides_and_joins_the_cluster_that_runs_it(tmp_path: Path) -> None:
    client = submitted("ppo.steps=7", "resources.threads=3")
    (tmp_path / "run.yaml").write_text(client.files["run.yaml"])
    there = load_config(tmp_path / "run.yaml")
    assert (there.ppo.steps, there.resources.threads, there.resources.address) == (7, 3, "auto")
    assert there.run == run_config().run
    assert client.submitted["entrypoint"].endswith("rlhf_ray.cli run -c run.yaml")


def test_nothing_else_travels_but_the_package_itself() -> None:
    client = submitted()
    assert set(client.files) == {"run.yaml"}
    (package,) = client.submitted["runtime_env"]["py_modules"]
    assert (Path(package) / "cli" / "__main__.py").is_file()
    assert Path(package).name == "rlhf_ray"
    files = [path for path in Path(package).rglob("*.*") if "__pycache__" not in str(path)]
    assert max(path.stat().st_size for path in files) < 100_000  # code, and nothing that a run has made
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_the_clusters_own_config_travels_for_the_preflight_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("available_node_types: {}\n")
    client = submitted(f"resources.cluster={tmp_path / 'mine.yaml'}")
    assert client.files["cluster.yaml"] == "available_node_types: {}\n"
    assert yaml.safe_load(client.files["run.yaml"])["resources"]["cluster"] == "cluster.yaml"


def test_a_stopped_job_has_time_to_save() -> None:
    assert submitted().submitted["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "45"}


def test_no_token_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-token")
    client = submitted()
    assert "canary-token" not in f"{client.submitted} {client.files}"


def test_each_submission_has_an_id_of_its_own_that_begins_with_the_runs() -> None:
    ids = {str(submitted().submitted["submission_id"]) for _ in range(5)}
    assert len(ids) == 5
    assert all(job.startswith("demo-") for job in ids)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.root=runs", "run.root"),
        ("run.from=runs/old", "run.from"),
        ("model.path=policy", "model.path"),
        ("reward_model.path=rm", "reward_model.path"),
        ("data.path=pairs.jsonl", "data.path"),
        ("feedback.store=feedback.db", "feedback.store"),
        ("feedback.store=sqlite:///feedback.db", "feedback.store"),
    ],
)
def test_a_path_that_means_nothing_on_the_cluster_is_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.*{key}=/shared/[a-z.]+$"):
        jobs.check_paths(run_config(override))


@pytest.mark.parametrize("store", ["/shared/f.db", "sqlite:////shared/f.db", "postgresql://db/feedback"])
def test_paths_that_every_node_sees_are_taken(store: str) -> None:
    jobs.check_paths(run_config("data.path=/shared/pairs.jsonl", f"feedback.store={store}"))


def test_following_shows_all_of_the_log_once_even_when_the_line_breaks() -> None:
    lines = ["ppo 1/3\n", RuntimeError("closed"), "ppo 1/3\nppo", " 2/3\n", RuntimeError("closed"), "ppo 1/3\n"]
    client = FakeJobs([Info("RUNNING"), Info("RUNNING"), Info("SUCCEEDED", 0)], lines, "ppo 1/3\nppo 2/3\nppo 3/3\n")
    assert follow(client) == (0, "ppo 1/3\nppo 2/3\nppo 3/3\n")


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (Info("SUCCEEDED", 0), 0),
        (Info("FAILED", 2), 2),
        (Info("FAILED", 4), 4),
        (Info("FAILED", -9), 137),
        (Info("FAILED", None), 5),
        (Info("STOPPED", None), 143),
    ],
)
def test_following_exits_as_the_run_did(info: Info, code: int) -> None:
    assert follow(FakeJobs([info]))[0] == code


def test_stopping_waits_until_the_run_has_saved() -> None:
    client = FakeJobs([Info("RUNNING"), Info("RUNNING"), Info("STOPPED")], log=f"ppo 4/9\n{SAVED}")
    said = jobs.stop("demo-1", client=client)
    assert client.stopped == ["demo-1"]
    assert said == "demo-1: stopped on SIGTERM; saved step 4; the same command resumes (exit 143)"


def test_a_run_that_was_killed_before_it_saved_is_not_said_to_have_saved() -> None:
    said = jobs.stop("demo-1", client=FakeJobs([Info("RUNNING"), Info("STOPPED")], log="ppo 4/9\n"))
    assert "killed before it could save" in said


def test_a_run_that_does_not_stop_is_an_error_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REQUEST_S", 0.05)
    with pytest.raises(InfrastructureError, match="still runs after 0 s"):
        jobs.stop("demo-1", client=FakeJobs([Info("RUNNING")]), within_s=0)


def test_a_job_that_is_over_is_not_stopped_again() -> None:
    client = FakeJobs([Info("SUCCEEDED", 0)])
    assert "over already" in jobs.stop("demo-1", client=client)
    assert not client.stopped


def test_a_failure_is_told_by_the_runs_last_line_and_code() -> None:
    client = FakeJobs([Info("FAILED", 2)], log="== base policy\nerror: data.path is missing\n\n")
    assert jobs.status("demo-1", client=client) == "demo-1 failed with exit code 2: error: data.path is missing"
    died = FakeJobs([Info("FAILED", None, message="runtime_env setup failed")])
    assert jobs.status("demo-1", client=died) == "demo-1 failed with exit code 5: runtime_env setup failed"


def test_jobs_are_listed_newest_first_and_foreign_drivers_left_out() -> None:
    client = FakeJobs(
        [
            Info("RUNNING", submission_id="old-1", metadata={"rlhf_run": "old"}, start_time=1),
            Info("RUNNING", submission_id=None),
            Info("PENDING", submission_id="new-1", metadata=None, start_time=2_000_000),
        ]
    )
    assert [line.split()[:3] for line in jobs.listing(client)[1:]] == [
        ["new-1", "-", "PENDING"],
        ["old-1", "old", "RUNNING"],
    ]


def test_the_address_given_wins_over_rays_variables_and_must_be_a_dashboards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert jobs.address_of(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert jobs.address_of("http://mine:8265/") == "http://mine:8265"
    assert jobs.address_of(None) == "http://other:8265"
    with pytest.raises(InputError, match="http://HOST:8265"):
        jobs.address_of("head:6379")


def test_nobody_at_the_address_is_said_at_once_and_nothing_is_left_in_the_environment() -> None:
    before = dict(os.environ)
    with pytest.raises(InfrastructureError, match=r"no Ray answers at http://127\.0\.0\.1:1"):
        jobs.connect("http://127.0.0.1:1")
    assert dict(os.environ) == before
