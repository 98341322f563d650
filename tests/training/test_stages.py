"""What a run takes over from another, and what it refuses before it begins."""

from pathlib import Path

import pytest

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.training.run_folder import RunFolder
from rlhf_ray.training.stages import check_models, run_stages, take_over


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = RunFolder.open(load_config(None, [f"run.root={tmp_path}", "run.id=old"]))
    for name in ("base_policy", "reward_model"):
        (folder.path / name).mkdir()
        (folder.path / name / "weights").write_text(name)
    folder.write_json("feedback.json", {"snapshot": "s"})
    folder.close()
    return folder.path


def config(old: Path, *overrides: str) -> Config:
    return load_config(None, [f"run.root={old.parent}", "run.id=new", f"run.from={old}", *overrides])


def taken(old: Path, *overrides: str) -> set[str]:
    new = RunFolder.open(config(old, *overrides))
    take_over(config(old, *overrides), new, say=lambda _: None)
    new.close()
    return {path.name for path in new.path.iterdir()} - {"config.yaml", ".lock"}


def test_everything_before_ppo_is_taken_over(old: Path) -> None:
    assert taken(old) == {"base_policy", "reward_model", "feedback.json"}


def test_or_only_the_stages_up_to_one(old: Path) -> None:
    assert taken(old, "run.take=feedback") == {"base_policy", "feedback.json"}


def test_a_run_without_a_base_policy_has_nothing_to_give(old: Path) -> None:
    (old / "base_policy").rename(old / "elsewhere")
    with pytest.raises(InputError, match="no base policy yet"):
        taken(old)


def test_a_run_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set run\.id"):
        run_stages(load_config(), until="ppo", say=print)


def test_a_head_size_that_the_engine_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="head size"):
        check_models(load_config(None, ["model.heads=8"]))
