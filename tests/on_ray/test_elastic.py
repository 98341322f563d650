"""Autoscaling with training: nodes come while a run goes on, one is taken away in the middle of a step, the rest go.

The cluster is Ray's own fake one: its autoscaler is the real one, and each "node" is a raylet on this machine. The head
has a seat for the learner, the scorer and one generator, so every further generator needs a node that is not there yet.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray

from rlhf_ray.config import load_config
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.training.base_policy import make_base_policy
from rlhf_ray.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1200)]

HEAD = "f" * 51 + "00000"
EMPTY = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
"""Keys that the autoscaler reads though the fake nodes need nothing of them."""
SEATS = {"rlhf_learner": 1, "rlhf_scorer": 1, "rlhf_generator": 1}
STEPS, PROMPTS = 60, 48
SMALL = """
run: {root: RUNS, id: elastic}
data: {prompts: 440, held_out: 20}
model: {hidden: 64, layers: 2, heads: 2, intermediate: 160}
pretrain: {max_epochs: 1}
sft: {max_epochs: 1}
rollout: {prompts: 48, generators: 3, min_generators: 1}
ppo: {steps: 60, minibatch: 16, epochs: 1, missing_end_penalty: 0.0}
checkpoint: {every: 25}
evaluate: {samples: 1, best_of: 1}
resources: {threads: 1, kv_cache_mib: 64, address: ADDRESS, cluster: CLUSTER, pin_roles: true,
  start_deadline_s: 600, call_deadline_s: 300}
"""


class FakeCloud:
    """A head with an autoscaler that may add two nodes of one seat each; everything it starts is known by its token."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, folder / "token"
        self.token.write_text(os.urandom(16).hex())
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        port, *others = free_ports(5)
        self.address = f"{ray.util.get_node_ip_address()}:{port}"
        seat = {"CPU": 1, "rlhf_generator": 1, "object_store_memory": 80_000_000}
        config = {
            "cluster_name": "fake",
            "max_workers": 2,
            "idle_timeout_minutes": 0.2,
            "upscaling_speed": 100.0,
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in EMPTY},
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "head_node_id": HEAD,
                **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True),
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 3, **SEATS}, "node_config": {}, "max_workers": 0},
                "generators": {"resources": seat, "node_config": {}, "min_workers": 0, "max_workers": 2},
            },
        }
        (folder / "cluster.json").write_text(json.dumps(config))  # JSON is YAML
        names = ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        self.command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=3",
            "--object-store-memory=120000000", f"--temp-dir={folder}/t", f"--autoscaling-config={folder}/cluster.json",
            *(f"--{name}={number}" for name, number in zip(names, others, strict=False)), "--include-dashboard=false",
            f"--resources={json.dumps(SEATS)}", "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
        log = (self.folder / "head.log").open("w")
        return subprocess.Popen(self.command, env=self.environment | fake, stdout=log, stderr=log)

    def processes(self) -> Iterator[tuple[int, dict[str, str], str]]:
        """Process id, environment and command of everything that carries the token."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                pairs = (path / "environ").read_text(errors="replace").split("\0")
                command = (path / "cmdline").read_text(errors="replace").replace("\0", " ")
            except OSError:
                continue
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if environment.get("RAY_AUTH_TOKEN_PATH") == str(self.token):
                yield int(path.name), environment, command

    def added_nodes(self) -> dict[str, int]:
        """The raylets of the nodes that the autoscaler has added, by node id."""
        return {
            environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]: pid
            for pid, environment, command in self.processes()
            if "raylet/raylet " in command and environment.get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", HEAD) != HEAD
        }

    def take_away(self, node: str) -> None:
        """Everything on a node is gone at once, as when a machine is."""
        raylet = self.added_nodes()[node]
        for pid in [*children_of(raylet), raylet]:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for pid, _, _ in list(self.processes()):
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)


class Run:
    """The command, and when it printed what."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[tuple[float, str]] = []
        self.reader = Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.began, line.rstrip()))

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def find(self, pattern: str) -> tuple[float, re.Match[str]] | None:
        return next(self.find_all(pattern), None)

    def find_all(self, pattern: str) -> Iterator[tuple[float, re.Match[str]]]:
        return ((at, found) for at, line in list(self.lines) if (found := re.search(pattern, line)))

    def log(self) -> str:
        return "\n".join(f"{at:6.1f} {line}" for at, line in self.lines)


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def wait_for(what: Callable[[], Any], run: Run, *, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, run.log()
        time.sleep(0.1)
    return found


def newcomer(run: Run, cloud: FakeCloud) -> tuple[float, str, str] | None:
    """When a generator on an added node joined, its name and its node. The head's own may join late, too."""
    nodes = {raylet: node for node, raylet in cloud.added_nodes().items()}
    for at, joined in run.find_all(r"(\S+) joined on .* pid (\d+)\)"):
        node = nodes.get(parent_of(int(joined[2])))
        if node:
            return at, joined[1], node
    return None


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The whole scenario, told once: what came when, and the run folder."""
    folder = tmp_path_factory.mktemp("elastic")
    with tempfile.TemporaryDirectory(prefix="fake", ignore_cleanup_errors=True) as short:  # sockets: 107 characters
        cloud = FakeCloud(Path(short))
        try:
            yield tell(cloud, folder)
        finally:
            cloud.end()


def tell(cloud: FakeCloud, folder: Path) -> dict[str, Any]:
    file, run_folder = folder / "elastic.yaml", folder / "runs" / "elastic"
    places = {"RUNS": folder / "runs", "ADDRESS": cloud.address, "CLUSTER": cloud.folder / "cluster.json"}
    file.write_text(re.sub("|".join(places), lambda found: str(places[found[0]]), SMALL))
    run_folder.mkdir(parents=True)
    make_base_policy(load_config(file), run_folder / "base_policy", say=lambda _: None)
    new_reward_model(run_folder / "base_policy", "decoder").save(run_folder / "reward_model")
    assert cloud.start().wait(timeout=90) == 0, (cloud.folder / "head.log").read_text()
    assert cloud.added_nodes() == {}

    run = Run([sys.executable, "-m", "rlhf_ray.cli", "run", "-c", str(file)], cloud.environment)
    times: dict[str, float] = {}
    wait_for(lambda: run.process.poll() is not None or cloud.added_nodes(), run, seconds=400)
    times["first node there"] = run.seconds()
    assert run.find("^== ppo"), run.log()  # no node before the run asked for generators
    times["joined"], joined, node = wait_for(lambda: newcomer(run, cloud), run, seconds=400)
    wait_for(lambda: [row for row in read_metrics(run_folder) if row["rollout/share_max"] < 1], run, seconds=200)
    steps = len(read_metrics(run_folder))
    wait_for(lambda: len(read_metrics(run_folder)) > steps, run, seconds=200)
    time.sleep(0.1)
    times["node taken away"] = run.seconds()
    cloud.take_away(node)
    times["loss noticed"], _ = wait_for(lambda: run.find(rf"lost {re.escape(joined)} "), run, seconds=120)
    code = run.process.wait(timeout=600)
    times["run ended"] = run.seconds()
    run.reader.join(timeout=10)
    wait_for(lambda: not cloud.added_nodes(), run, seconds=90)
    times["idle nodes gone"] = run.seconds()
    print(run.log())
    print(json.dumps(times, indent=1))
    return {"code": code, "run": run, "folder": run_folder, "times": times, "rows": read_metrics(run_folder)}


def test_a_run_ends_whole_though_nodes_come_and_one_is_taken_away_in_the_middle_of_a_step(story: Any) -> None:
    assert story["code"] == 0, story["run"].log()
    rows = story["rows"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["episode"] for row in rows] == [PROMPTS * step for step in range(1, STEPS + 1)]
    assert json.loads((story["folder"] / "summary.json").read_text())["rollouts"] == STEPS * PROMPTS


def test_rollouts_of_added_nodes_were_trained_on(story: Any) -> None:
    rows = story["rows"]
    assert sum(row["rollout/joined"] for row in rows) >= 1
    assert min(row["rollout/share_max"] for row in rows) < 1
    assert max(row["rollout/generators"] for row in rows) >= 2


def test_what_went_down_with_the_node_was_sampled_again_and_nothing_was_stale(story: Any) -> None:
    rows = story["rows"]
    assert sum(row["rollout/lost_generators"] for row in rows) == 1
    assert sum(row["rollout/retried"] for row in rows) > 0
    assert {row["rollout/staleness_max"] for row in rows} == {0}
    assert max(row["mismatch/max_abs"] for row in rows) < 1e-4


def test_nodes_that_are_no_longer_needed_go(story: Any) -> None:
    times = story["times"]
    assert times["idle nodes gone"] - times["run ended"] < 90
