"""The real command, killed in each of its processes one after the other and gone on with, ends in the same bits as one
that nobody killed; and where no checkpoint verifies it does not start over.

A run's processes find this folder's `sitecustomize.py` (written below), which lets one of them die by SIGKILL at one
place, once. `tests/training/test_killed.py` does it to the loop alone, at more places, in every run of the tests.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.training.metrics import read_metrics
from tests.on_ray.test_run import TIMES, command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3000)]

POINTS = [
    # the learner's process
    "rlhf_ray.roles.learner Learner.prepare before 2",
    "rlhf_ray.roles.networks Networks.values before 4",
    "rlhf_ray.roles.learner Learner._learn after 2",
    "torch.optim.adamw AdamW.step before 3",
    "torch.optim.adamw AdamW.step after 3",
    "rlhf_ray.roles.learner Learner.update after 2",
    "rlhf_ray.roles.learner Learner._copied before 6",
    "rlhf_ray.models.checkpoint _write before 8",
    "rlhf_ray.models.checkpoint fsync after 4",
    # the scorer's
    "rlhf_ray.rewards.combined CombinedRewards.score before 2",
    # the driver's
    "rlhf_ray.roles.weights WeightsHandoff._verify before 2",
    "rlhf_ray.training.metrics MetricsLog.write after 2",
]
SURVIVED = [
    # the generator's, whose death the run survives by itself
    "rlhf_ray.roles.generator Generator.generate before 2",
    "rlhf_ray.roles.generator Generator.load_weights after 2",
]
STEPS = 30
SETTINGS = ["deterministic=true", f"ppo.steps={STEPS}", "checkpoint.every=1", "rollout.prompts=16", "ppo.epochs=1"]
KILLER = """
import functools, importlib.abc, importlib.util, os, signal, sys

place, marker = os.environ.get("KILL_AT", "").split(), os.environ.get("KILLED", "")
if place and not os.path.exists(marker):
    module, path, when, call = place[0], place[1].split("."), place[2], int(place[3])

    def die():
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def plant(found):
        owner = found
        for name in path[:-1]:
            owner = getattr(owner, name)
        plain, calls = getattr(owner, path[-1]), []

        @functools.wraps(plain)  # Ray reads its signature
        def wrapped(*args, **kwargs):
            calls.append(1)
            if when == "before" and len(calls) == call:
                die()
            result = plain(*args, **kwargs)
            if when == "after" and len(calls) == call:
                die()
            return result

        setattr(owner, path[-1], wrapped)

    class Planting(importlib.abc.MetaPathFinder):
        def find_spec(self, name, where, target=None):
            if name != module:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def exec_module(found):
                execute(found)
                plant(found)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Planting())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run up to its reward model, and one that goes on from there unbroken."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "sitecustomize.py").write_text(KILLER)
    run(folder, "run.id=base", "ppo.steps=1")
    run(folder, *from_base(folder, "unbroken"))
    return folder


def from_base(folder: Path, name: str) -> list[str]:
    """A run in a folder of its own; all have one id, for seeds follow from it."""
    return [f"run.from={folder / 'runs' / 'base'}", f"run.root={folder / name}", "run.id=same", *SETTINGS]


def run(folder: Path, *settings: str, expected: int = 0) -> str:
    done = subprocess.run(command(folder, *settings), capture_output=True, text=True, timeout=600)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def killed(folder: Path, place: str, name: str = "killed") -> tuple[int, str]:
    marker = folder / f"died at {place}"
    settings = command(folder, *from_base(folder, name))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "KILL_AT": place, "KILLED": str(marker)}
    done = subprocess.run(settings, capture_output=True, text=True, timeout=600, env=environment)
    assert marker.exists(), f"nothing died at {place}: {done.stdout}{done.stderr}"
    return done.returncode, done.stdout + done.stderr


def bits(run: Path) -> dict[str, Any]:
    last = run / "checkpoints" / f"step_{STEPS:08d}"
    files = {path.name: path.read_bytes() for path in [*last.iterdir(), run / "policy" / "model.safetensors"]}
    rows = [{name: x for name, x in row.items() if not name.startswith(TIMES)} for row in read_metrics(run)]
    for row in rows:  # of who came and went, which the kills change
        for name in ("rollout/joined", "rollout/lost_generators", "rollout/retried"):
            row.pop(name, None)
    return {**files, "metrics": json.dumps(rows)}


def check_same_bits(folder: Path, name: str) -> None:
    wanted, found = bits(folder / "unbroken" / "same"), bits(folder / name / "same")
    assert [file for file in wanted if found.get(file) != wanted[file]] == []


def test_killed_place_after_place_it_ends_in_the_same_bits(folder: Path) -> None:
    for place in POINTS:
        code, log = killed(folder, place)
        assert code != 0, f"{place}: {log}"
        if "training.metrics" not in place and "WeightsHandoff" not in place:  # the driver is alive to say so
            assert code == 5, f"{place}: {log}"
            assert "the same command resumes" in log, f"{place}: {log}"
        print(f"{place}: exit {code}, {len(read_metrics(folder / 'killed' / 'same'))} steps")
    run(folder, *from_base(folder, "killed"))
    check_same_bits(folder, "killed")


@pytest.mark.parametrize("place", SURVIVED)
def test_a_generator_killed_is_replaced_and_the_run_ends_in_the_same_bits(folder: Path, place: str) -> None:
    name = f"survivor-{SURVIVED.index(place)}"
    code, log = killed(folder, place, name)
    assert code == 0, log
    assert "asked for generator-0.2 instead" in log
    check_same_bits(folder, name)


def test_where_no_checkpoint_verifies_it_exits_3_and_starts_nothing_over(folder: Path) -> None:
    broken = folder / "killed" / "same"
    (broken / "summary.json").unlink()
    for checkpoint in (broken / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    lines = len(read_metrics(broken))
    log = run(folder, *from_base(folder, "killed"), expected=3)
    assert "Restore one from a backup, or remove them to start over" in log
    assert len(read_metrics(broken)) == lines
