"""Killed anywhere and gone on with, a run ends in the same bits as one that nobody killed.

Each point is a place in the program. A child process is killed there by SIGKILL, in the third of four steps or in the
save of the last one; another goes on from the folder that it left. `tests/on_ray/test_killed.py` does the same to the
real command.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.tensorboard  # here, or each child would import it anew

from rlhf_ray.models import checkpoint
from rlhf_ray.roles import learner
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.networks import Networks
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.metrics import MetricsLog, read_metrics
from tests.models.tiny import make_policy_folder
from tests.training import small_loop
from tests.training.small_loop import OneGenerator, OneLearner, SamplingEngine, run_or_go_on

Plant = Callable[[], None]
"""Changes the program, in the child only, so that it dies somewhere."""


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, call: int) -> Plant:
    return lambda: _wrap(owner, name, call, at_start=True)


def after(owner: Any, name: str, call: int) -> Plant:
    return lambda: _wrap(owner, name, call, at_start=False)


def _wrap(owner: Any, name: str, call: int, *, at_start: bool) -> None:
    plain, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if at_start and len(calls) == call:
            die()
        result = plain(*args, **kwargs)
        if not at_start and len(calls) == call:
            die()
        return result

    setattr(owner, name, wrapped)


def mid_backward() -> None:
    say, calls = Networks.say, []

    def say_and_die_where_its_gradient_comes(self: Networks, *args: Any, **kwargs: Any) -> Any:
        said = say(self, *args, **kwargs)
        if said.logprobs.requires_grad:
            calls.append(1)
            if len(calls) == 11:  # 4 a step: 2 minibatches, each with its demonstrations
                said.logprobs.register_hook(die)
        return said

    Networks.say = say_and_die_where_its_gradient_comes  # type: ignore[method-assign]


def torn_line() -> None:
    write, calls = MetricsLog.write, []

    def write_half_of_the_third(self: MetricsLog, step: int, metrics: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            with self._path.open("ab") as file:
                file.write(b'{"step": 3, "objective/kl": 0.0')
            die()
        write(self, step, metrics)

    MetricsLog.write = write_half_of_the_third  # type: ignore[method-assign]


def torn_file() -> None:
    write, calls = checkpoint._write, []

    def write_half(path: Path, data: bytes) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 9:  # of the second checkpoint: 7 files each
            path.write_bytes(data[: len(data) // 2])
            die()
        return write(path, data)

    checkpoint._write = write_half


FILES = 7
"""Of a checkpoint: policy, critic, their optimizers, averaged, state and manifest."""
POINTS: dict[str, Plant] = {
    "before rollouts": before(OneGenerator, "generate", 3),
    "mid rollouts": before(SamplingEngine, "answer", 23),  # 4 probes at the start and after each step, 4 answers a step
    "before scoring": before(small_loop.Letters, "score", 3),
    "mid scoring": after(small_loop.Letters, "score_one", 10),
    "before prepare": before(Learner, "prepare", 3),
    "mid prepare": before(Networks, "all_reference_logprobs", 3),
    "before an update's forward pass": before(Networks, "values", 8),
    "mid backward": mid_backward,
    "between two minibatches": after(Learner, "_learn", 5),
    "before the policy's optimizer": before(torch.optim.AdamW, "step", 11),
    "between policy's and critic's optimizer": after(torch.optim.AdamW, "step", 11),
    "after the critic's optimizer": after(torch.optim.AdamW, "step", 12),
    "after the update": after(OneLearner, "update", 3),
    "mid hand-off, before the engine loads": before(SamplingEngine, "load", 4),
    "mid hand-off, before it is verified": before(WeightsHandoff, "_verify", 4),
    "mid hand-off, before the release": before(Generator, "release", 4),
    "before the metrics line": before(MetricsLog, "write", 3),
    "mid metrics line": torn_line,
    "after the metrics line, before its checkpoint": before(OneLearner, "save", 2),
    "while the tensors are copied": before(Learner, "_copied", 8),
    "before a checkpoint's first file": before(checkpoint, "_write", FILES + 1),
    "mid file": torn_file,
    "before the manifest": before(checkpoint, "_write", 2 * FILES),
    "before a checkpoint has its name": before(Path, "rename", 2),
    "after it has it, before that is on the disk": after(Path, "rename", 2),
    "before pruning": before(learner, "prune", 2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy")


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert in_a_child(base, folder) == 0
    return folder


def in_a_child(base: Path, folder: Path, plant: Plant | None = None, *, deadline_s: float = 60) -> int:
    """The exit code of the run in a process of its own; minus the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if plant is not None:
                plant()
            run_or_go_on(base, folder)
            code = 0
        finally:
            os._exit(code)
    with killed_after(child, deadline_s):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def killed_after(child: int, deadline_s: float) -> Iterator[None]:
    def overdue(*_: Any) -> None:
        os.kill(child, signal.SIGKILL)

    previous = signal.signal(signal.SIGALRM, overdue)
    remaining = signal.setitimer(signal.ITIMER_REAL, deadline_s)[0]
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, remaining)


def bits(folder: Path) -> dict[str, Any]:
    """All that a run leaves that follows from its seed: its last checkpoint's bytes and its metrics less the times."""
    last = folder / "checkpoints" / f"step_{small_loop.STEPS:08d}"
    left = {path.name: path.read_bytes() for path in last.iterdir()}
    timed = ("time/", "sync/seconds", "rollout/tokens_per_s")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(folder)]
    return {**left, "metrics": json.dumps(rows)}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_that_goes_on_ends_in_the_same_bits(
    point: str, base: Path, unbroken: Path, tmp_path: Path
) -> None:
    assert in_a_child(base, tmp_path, POINTS[point]) == -signal.SIGKILL
    assert len(read_metrics(tmp_path)) >= 2  # it had something to go on from
    assert in_a_child(base, tmp_path) == 0
    wanted, found = bits(unbroken), bits(tmp_path)
    assert [name for name in wanted if found.get(name) != wanted[name]] == []
    assert found.keys() == wanted.keys()


def forgets_moments() -> None:
    load = Learner.load

    def load_without(self: Learner, found: Any) -> None:
        tensors = {name: group for name, group in found.tensors.items() if not name.startswith("optimizer")}
        load(self, checkpoint.Checkpoint(found.step, found.path, tensors, found.state, found.passed_over))

    Learner.load = load_without  # type: ignore[method-assign]


def keeps_old_lines() -> None:
    MetricsLog.truncate_after = lambda *_: 0  # type: ignore[method-assign]


def forgets_the_kl_controller() -> None:
    load = Learner.load

    def load_without(self: Learner, found: Any) -> None:
        kl = self.kl
        load(self, found)
        self.kl = kl

    Learner.load = load_without  # type: ignore[method-assign]


def draws_otherwise() -> None:
    answer = SamplingEngine.answer
    SamplingEngine.answer = lambda self, prompt, sampling, seed: answer(self, prompt, sampling, seed + 1)  # type: ignore[method-assign]


@pytest.mark.parametrize("lost", [forgets_moments, keeps_old_lines, forgets_the_kl_controller, draws_otherwise])
def test_a_resume_that_loses_anything_ends_in_other_bits(
    lost: Plant, base: Path, unbroken: Path, tmp_path: Path
) -> None:
    assert in_a_child(base, tmp_path, POINTS["after the metrics line, before its checkpoint"]) == -signal.SIGKILL
    assert in_a_child(base, tmp_path, lost) == 0
    assert bits(tmp_path) != bits(unbroken)
