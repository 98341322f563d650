"""What is asked first, where reward models disagree."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli.feedback import app
from rlhf_ray.config import load_config
from rlhf_ray.errors import InputError
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.tables import tasks
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.training.run_folder import RunFolder
from tests.models.tiny import make_policy_folder


def make_run(root: Path, name: str, seed: int) -> Path:
    folder = RunFolder.open(load_config(None, [f"run.root={root}", f"run.id={name}"]))
    folder.close()
    made = new_reward_model(make_policy_folder(folder.policy), "decoder", seed=seed)
    made.save(folder.reward_model)
    return folder.path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Q{n}", "completions": [f"answer {n}", "no", "yes"][: 1 + n % 3]} for n in range(6)]
    path = tmp_path / "ask.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def priorities(store: Path) -> list[float | None]:
    with FeedbackStore(store, read_only=True) as opened, opened.reading() as connection:
        return [row.priority for row in connection.execute(tasks.select().order_by(tasks.c.seq))]


def test_what_models_disagree_on_has_the_higher_priority_and_single_answers_have_none(
    tmp_path: Path, file: Path
) -> None:
    one, two = make_run(tmp_path, "one", 1), make_run(tmp_path, "two", 2)
    for name, other in (("unlike", two), ("alike", one)):
        told = ["ask", str(file), "--store", str(tmp_path / f"{name}.db")]
        done = CliRunner().invoke(app, [*told, "--ensemble", str(one), "--ensemble", str(other)])
        assert done.exit_code == 0, done.output
    unlike, alike = priorities(tmp_path / "unlike.db"), priorities(tmp_path / "alike.db")
    assert [value is None for value in unlike] == [n % 3 == 0 for n in range(6)]
    assert all(value > 1e-9 for value in unlike if value is not None)
    assert all(value == pytest.approx(0, abs=1e-12) for value in alike if value is not None)


def test_one_reward_model_cannot_disagree_and_the_members_of_one_can(tmp_path: Path, file: Path) -> None:
    run = make_run(tmp_path, "one", 1)
    told = ["ask", str(file), "--store", str(tmp_path / "s.db"), "--ensemble", str(run)]
    refused = CliRunner().invoke(app, told)
    assert isinstance(refused.exception, InputError)
    assert "or a run with several members" in str(refused.exception)
    shutil.copytree(make_run(tmp_path, "two", 2) / "reward_model", run / "reward_model" / "members" / "1")
    assert CliRunner().invoke(app, told).exit_code == 0
    assert any(value for value in priorities(tmp_path / "s.db"))
