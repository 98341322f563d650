"""A real cluster with a token: refusals within seconds, and a run submitted, followed, stopped and resumed."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.on_ray.test_run import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")


@dataclass
class RayCluster:
    """A head of our own: own ports, own folder, own token."""

    folder: Path
    ports: dict[str, int]
    token: str
    took: dict[str, float] = field(default_factory=dict)

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    def environment(self, token: str | None) -> dict[str, str]:
        """A user's shell, with or without the token; `HOME` is empty, or a token lying there would be shown."""
        shell = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        shown = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        path = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}
        return {**shell, **path, **shown, "RAY_USAGE_STATS_ENABLED": "0"}

    def rlhf(
        self, *arguments: str, token: str | None = "ours", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command of ours, in a folder of its own, and how long it took."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_ray.cli", *arguments],
            env=self.environment(self.token if token == "ours" else token),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        self.took[" ".join(arguments[:2])] = time.monotonic() - began
        return done

    def submit(self, *overrides: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return self.rlhf("submit", "-c", "small.yaml", "--address", self.dashboard, *overrides, timeout=timeout)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "small.yaml").write_text(SMALL.replace("RUNS", str(folder / "runs")) + "resources: {threads: 1}\n")
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = {name: one.getsockname()[1] for name, one in zip(PORTS, sockets, strict=True)}
    found = RayCluster(folder, ports, token=secrets.token_hex(32))
    # Ray's sockets lie under its folder, and their paths may not be long
    temporary = Path("/tmp") / f"rlhf-{secrets.token_hex(3)}"
    start = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--dashboard-host=127.0.0.1"]
    start += ["--object-store-memory=200000000", f"--temp-dir={temporary}"]
    start += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={port}" for name, port in ports.items())]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            start, env=found.environment(found.token), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_nodes(found, head)
        yield found
    finally:
        print({command: f"{seconds:.1f} s" for command, seconds in found.took.items()})
        end_all(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_nodes(cluster: RayCluster, head: subprocess.Popen[bytes]) -> None:
    """Until the dashboard answers at all, cheaply, and then until it knows its node."""
    deadline = time.monotonic() + 180
    ready = False
    while not ready:
        log = (cluster.folder / "head.log").read_text()
        assert head.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(1)
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", cluster.ports["dashboard-port"])) == 0:
                ready = "1 now" in cluster.rlhf("plan", "--address", cluster.dashboard).stdout


def end_all(folder: Path) -> None:
    """Ends every process of the Ray that lives in a folder of ours; a head that failed to start leaves some."""
    family = [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]
    for process in family:
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()


@pytest.mark.parametrize(("token", "said"), [(None, "none was shown"), ("0" * 64, "refuses the token")])
def test_without_the_right_token_nothing_is_told_and_nothing_runs(
    cluster: RayCluster, token: str | None, said: str
) -> None:
    gcs = f"127.0.0.1:{cluster.ports['port']}"
    for command in (
        ["submit", "-c", "small.yaml", "--address", cluster.dashboard],
        ["jobs", "list", "--address", cluster.dashboard],
        ["plan", "-c", "small.yaml", "--address", gcs],
        ["run", "-c", "small.yaml", f"resources.address={gcs}"],
    ):
        done = cluster.rlhf(*command, token=token)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert "RAY_AUTH_TOKEN_PATH" in done.stderr
        assert cluster.took[" ".join(command[:2])] < 30
    assert not (cluster.folder / "runs").exists()


def test_what_cannot_come_is_refused_before_it_waits(cluster: RayCluster) -> None:
    gcs = f"127.0.0.1:{cluster.ports['port']}"
    for command in (
        ["plan", "-c", "small.yaml", "--address", cluster.dashboard],
        ["submit", "-c", "small.yaml", "--address", cluster.dashboard],
        ["run", "-c", "small.yaml", f"resources.address={gcs}"],
    ):
        done = cluster.rlhf(*command, "resources.learner_gpus=1")
        assert (done.returncode, "learner: 1 of 1 would wait for ever" in done.stderr) == (2, True), done.stderr
        assert cluster.took[" ".join(command[:2])] < 10
    assert not (cluster.folder / "runs").exists()
    assert cluster.rlhf("jobs", "list", "--address", cluster.dashboard).stdout.count("\n") == 1


REPORT = """
import sys
import ray._raylet
from rlhf_ray.roles.joining import use_token
from ray.core.generated import autoscaler_pb2
use_token()
config = autoscaler_pb2.ClusterConfig()
config.node_group_configs.add(name="gpu", max_count=int(sys.argv[2]), resources={"CPU": 4, "GPU": 1})
ray._raylet.GcsClient(sys.argv[1]).report_cluster_config(config.SerializeToString())
"""


def test_what_an_autoscaler_has_reported_may_come(cluster: RayCluster) -> None:
    gcs = f"127.0.0.1:{cluster.ports['port']}"

    def report(nodes: int) -> None:
        command = [sys.executable, "-c", REPORT, gcs, str(nodes)]
        subprocess.run(command, env=cluster.environment(cluster.token), check=True, timeout=60)

    report(2)
    done = cluster.rlhf("plan", "-c", "small.yaml", "--address", gcs, "resources.learner_gpus=1")
    report(0)
    assert (done.returncode, "1 on nodes to come" in done.stdout) == (0, True), done.stdout + done.stderr


def test_a_run_is_submitted_and_followed_to_its_end(cluster: RayCluster) -> None:
    done = cluster.submit("--follow", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ppo 8/8 ", done.stdout, re.MULTILINE), done.stdout
    assert done.stderr.strip().endswith("is done")
    assert json.loads((cluster.folder / "runs" / "small" / "summary.json").read_text())["steps"] == 8


def test_rays_own_command_runs_it_as_well(cluster: RayCluster) -> None:
    submit = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--runtime-env-json"]
    submit += [json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}}), "--", "rlhf", "run", "-c"]
    submit += [str(cluster.folder / "small.yaml"), "resources.address=auto"]
    refused = subprocess.run(submit, env=cluster.environment(None), capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "Authentication required" in refused.stdout + refused.stderr
    done = subprocess.run(submit, env=cluster.environment(cluster.token), capture_output=True, text=True, timeout=200)
    assert (done.returncode, "is done (a new one takes another run.id)" in done.stdout) == (0, True), done.stdout


def test_stopped_it_saves_with_exit_143_and_submitted_again_it_resumes(cluster: RayCluster) -> None:
    longer = ["run.id=stopped", f"run.from={cluster.folder}/runs/small", "checkpoint.every=50"]
    job = re.search(r"job (\S+):", cluster.submit(*longer, "ppo.steps=400").stdout)
    assert job is not None
    address = ["--address", cluster.dashboard]
    follower = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.cli", "jobs", "logs", job[1], "--follow", *address],
        env=cluster.environment(cluster.token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    log = ""
    for line in follower.stdout:
        log += line
        if re.match(r"ppo +\d+/400", line):
            break
    else:
        pytest.fail(log)
    stopped = cluster.rlhf("jobs", "stop", job[1], *address, timeout=200)
    saved = re.search(r"saved step (\d+); the same command resumes \(exit 143\)", stopped.stdout)
    assert saved, stopped.stdout + stopped.stderr
    log += follower.stdout.read()
    assert follower.wait(timeout=60) == 143, log
    steps = int(saved[1]) + 2
    done = cluster.submit(*longer, f"ppo.steps={steps}", "--follow", timeout=600)
    assert (done.returncode, f"resuming run stopped at step {saved[1]}" in done.stdout) == (0, True), done.stdout
    assert re.search(rf"^ppo +{steps}/{steps} ", done.stdout, re.MULTILINE), done.stdout
