"""A version's lineage says what a run's files say."""

import json
from pathlib import Path

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import InputError
from rlhf_ray.training.lineage import lineage_of
from rlhf_ray.training.run_folder import RunFolder


def make_run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.open(load_config(None, [f"run.root={tmp_path}", "run.id=r"]))
    folder.close()
    return folder


def test_a_finished_run_says_all_of_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    snapshot = {"snapshot": "s-1", "sha256": "ab", "rows": 7}
    folder.write_json("feedback.json", snapshot)
    folder.write_json("summary.json", {"steps": 30, "kl": 2.5, "gold": {"before": 0.4}, "wall_s": 9, "reward": None})
    lineage = lineage_of(folder.path, reward_model_version=4)
    assert (lineage["run_id"], lineage["step"], lineage["reward_model_version"]) == ("r", 30, 4)
    assert lineage["snapshot"] == snapshot
    wanted = {"gold": {"before": 0.4}, "win_rate": None, "reward": None, "kl": 2.5, "reward_model": None}
    assert (lineage["evaluation"], lineage["chosen"]) == (wanted, None)
    assert json.loads(json.dumps(lineage, allow_nan=False)) == lineage


def test_where_a_look_did_best_the_version_is_of_its_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.write_json("summary.json", {"steps": 30})
    folder.write_json("best.json", {"step": 20, "rewards": [1.0], "judged": [0.5], "by": "the judge"})
    lineage = lineage_of(folder.path)
    assert (lineage["step"], lineage["chosen"]) == (20, {"by": "the judge", "of_steps": 30})


def test_another_config_has_another_hash(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    before = lineage_of(folder.path)["config_sha256"]
    config = folder.path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    assert lineage_of(folder.path)["config_sha256"] != before


def test_a_run_that_has_not_finished_has_no_evaluation(tmp_path: Path) -> None:
    lineage = lineage_of(make_run(tmp_path).path)
    assert (lineage["step"], lineage["snapshot"], lineage["evaluation"]) == (None, None, None)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        lineage_of(tmp_path)
