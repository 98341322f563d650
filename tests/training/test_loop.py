"""The loop around the page: it checkpoints, logs, stops when asked, and resumes where it said."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import load_config
from rlhf_ray.errors import Interrupted
from rlhf_ray.models.checkpoint import save_checkpoint
from rlhf_ray.training.loop import resume, train
from rlhf_ray.training.metrics import read_metrics
from rlhf_ray.training.run_folder import BEST, RunFolder
from rlhf_ray.training.stopping import Stopping
from tests.training.fakes import Roles
from tests.training.test_ppo import make_ppo


def run(
    tmp_path: Path, roles: Roles, *, start: int = 0, stopping: Stopping | None = None, said: Any = None
) -> list[str]:
    overrides = ("ppo.steps=5", "checkpoint.every=2")
    config = load_config(
        None,
        ["run.id=t", "rollout.prompts=4", "rollout.samples=2", "rollout.max_tokens=8", "ppo.minibatch=4", *overrides],
    )
    said = [] if said is None else said
    train(
        make_ppo(roles, *overrides),
        start=start,
        folder=RunFolder(tmp_path),
        config=config,
        measure=lambda done, step: {"gold/mean": 0.5},
        stopping=stopping or Stopping(),
        say=said.append,
    )
    return said


def test_a_checkpoint_is_made_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    roles = Roles()
    run(tmp_path, roles)
    assert [event for event in roles.events if event.startswith("save")] == ["save 2", "save 4", "save 5", "saved"]


def test_every_step_is_one_metrics_line_and_one_line_said(tmp_path: Path) -> None:
    said = run(tmp_path, Roles())
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(said) == 5
    assert "gold 0.50" in said[0]


def test_asked_to_stop_it_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    roles, stopping = Roles(), Stopping()
    stopping.asked = signal.SIGTERM
    with pytest.raises(Interrupted, match="saved step 1; the same command resumes") as stopped:
        run(tmp_path, roles, stopping=stopping)
    assert stopped.value.exit_code == 143
    assert roles.events[-2:] == ["save 1", "saved"]


def test_it_does_not_say_saved_of_what_the_disk_refused(tmp_path: Path) -> None:
    class Full(Roles):
        def finish_saving(self) -> str | None:
            return "No space left on device"

    stopping, said = Stopping(), []
    stopping.asked = signal.SIGTERM
    with pytest.raises(Interrupted, match="step 1 could not be saved; the same command resumes"):
        run(tmp_path, Full(), stopping=stopping, said=said)
    assert "no checkpoint at step 1: No space left on device" in said[-1]


def test_a_steps_line_is_there_before_its_checkpoint(tmp_path: Path) -> None:
    class Watching(Roles):
        def save(self, folder: Path, step: int, *, best: int | None = None) -> str | None:
            lines.append((step, len(read_metrics(tmp_path))))
            return None

    lines: list[tuple[int, int]] = []
    run(tmp_path, Watching())
    assert lines == [(2, 2), (4, 4), (5, 5)]


def test_the_run_ends_once_its_last_checkpoint_is_on_the_disk_and_keeps_the_one_before_its_best_step(
    tmp_path: Path,
) -> None:
    roles = Roles()
    RunFolder(tmp_path).write_json(BEST, {"step": 3})
    run(tmp_path, roles)
    assert roles.events[-2:] == ["save 5 best 3", "saved"]


def test_a_resumed_run_forgets_the_metrics_beyond_its_checkpoint(tmp_path: Path) -> None:
    roles = Roles()
    run(tmp_path, roles)
    roles.weights_step = 2
    run(tmp_path, roles, start=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    class Full(Roles):
        def save(self, folder: Path, step: int, *, best: int | None = None) -> str | None:
            return "No space left on device" if step > 2 else None  # of the one before

    said = run(tmp_path, Full())
    warned = [line.split(":")[1] for line in said if line.startswith("WARNING")]
    assert warned == [" no checkpoint at step 2", " no checkpoint at step 4"]
    assert [row["checkpoint/failed"] for row in read_metrics(tmp_path)] == [0, 0, 0, 0, 1]


def test_without_a_checkpoint_it_begins_with_weights_step_0_published(tmp_path: Path) -> None:
    roles = Roles()
    assert resume(make_ppo(roles), folder=RunFolder(tmp_path), say=print) == 0
    assert roles.events == ["publish"]


def test_it_resumes_from_the_newest_valid_checkpoint_and_names_what_it_passed_over(tmp_path: Path) -> None:
    folder, roles, said = RunFolder(tmp_path), Roles(), []
    for step in (2, 4):
        save_checkpoint(folder.checkpoints, step, tensors={"policy": {"w": torch.ones(1)}}, state={})
    (folder.checkpoints / "step_00000004" / "state.json").write_text("[]")
    roles.weights_step = 2
    assert resume(make_ppo(roles), folder=folder, say=said.append) == 2
    assert roles.loaded == folder.checkpoints / "step_00000002"
    assert "step_00000004" in said[0]
    assert "resuming" in said[-1]
