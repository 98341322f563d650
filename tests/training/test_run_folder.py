"""A run folder belongs to one config and one process."""

from pathlib import Path

import pytest

from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.training.run_folder import RunFolder, existing_run


def config(tmp_path: Path, *overrides: str):
    return load_config(None, [f"run.root={tmp_path}", "run.id=r", *overrides])


def test_opening_saves_the_resolved_config(tmp_path: Path) -> None:
    RunFolder.open(config(tmp_path, "seed=5")).close()
    assert load_config(tmp_path / "r" / "config.yaml").seed == 5


def test_another_config_is_refused_with_the_keys_that_differ_and_nothing_changes(tmp_path: Path) -> None:
    RunFolder.open(config(tmp_path)).close()
    with pytest.raises(ConfigError, match=r"seed \(0 -> 1\)"):
        RunFolder.open(config(tmp_path, "seed=1"))
    assert load_config(tmp_path / "r" / "config.yaml").seed == 0


def test_more_steps_are_a_resumption_and_not_another_run(tmp_path: Path) -> None:
    RunFolder.open(config(tmp_path)).close()
    RunFolder.open(config(tmp_path, "ppo.steps=999", "checkpoint.every=3")).close()


def test_a_service_of_rewards_may_move_and_may_not_become_another(tmp_path: Path) -> None:
    source = "rewards.sources.judge={{kind: judge, url: '{url}', model: {model}}}"
    RunFolder.open(config(tmp_path, source.format(url="http://a/v1", model="m"))).close()
    RunFolder.open(config(tmp_path, source.format(url="http://b:81/v1", model="m"))).close()
    with pytest.raises(ConfigError, match=r"rewards\.sources"):
        RunFolder.open(config(tmp_path, source.format(url="http://a/v1", model="other")))


def test_a_run_that_shares_out_by_load_may_be_asked_for_other_numbers_of_engines(tmp_path: Path) -> None:
    elastic = config(tmp_path, "rollout.generators=3", "rollout.min_generators=2")
    folder = RunFolder.open(elastic)
    assert folder.wanted_generators is None
    folder.want_generators(2)
    assert folder.wanted_generators == 2
    for wanted, said in ((1, "fewer than rollout.min_generators=2"), (4, "seats for 3 generators")):
        with pytest.raises(InputError, match=said):
            folder.want_generators(wanted)
    assert folder.wanted_generators == 2
    folder.close()


def test_a_run_with_a_fixed_map_keeps_its_engines(tmp_path: Path) -> None:
    folder = RunFolder.open(config(tmp_path, "rollout.generators=2"))
    with pytest.raises(InputError, match=r"started with rollout\.min_generators below"):
        folder.want_generators(1)
    folder.close()


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    first = RunFolder.open(config(tmp_path))
    with pytest.raises(ConfigError, match="being written by process"):
        RunFolder.open(config(tmp_path))
    first.close()
    RunFolder.open(config(tmp_path)).close()


def test_a_folder_that_no_run_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        existing_run(tmp_path)


def test_json_appears_whole_and_reads_back(tmp_path: Path) -> None:
    folder = RunFolder.open(config(tmp_path))
    assert folder.read_json("x.json") is None
    folder.write_json("x.json", {"a": [1, "ü"]})
    assert folder.read_json("x.json") == {"a": [1, "ü"]}
    assert not list(folder.path.glob(".x.json*"))
    folder.close()
