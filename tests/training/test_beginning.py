"""What a run takes over from another, and which models it refuses before it begins."""

import shutil
from pathlib import Path

import pytest

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError, InputError, ModelError
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.files import MEMBERS
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.training.beginning import TAKEN_FROM, check_models, check_source, take_over
from rlhf_ray.training.run_folder import RunFolder
from tests.models.tiny import make_policy_folder
from tests.recipes.test_preferences import make_pair


def config(old: Path, *overrides: str) -> Config:
    return load_config(None, [f"run.root={old.parent}", "run.id=new", f"run.from={old}", *overrides])


def taken(old: Path, *overrides: str) -> set[str]:
    new = RunFolder.open(config(old, *overrides))
    take_over(config(old, *overrides), new, say=lambda _: None)
    new.close()
    return {path.name for path in new.path.iterdir()} - {"config.yaml", ".lock", TAKEN_FROM}


def test_everything_before_ppo_is_taken_over(old: Path) -> None:
    assert taken(old) == {"base_policy", "reward_model", "feedback.json"}


def test_what_the_base_policy_was_before_it_imitated_goes_with_it(old: Path) -> None:
    (old / "pretrained").mkdir()
    assert taken(old, "run.take=base_policy") == {"base_policy", "pretrained"}


def test_or_only_the_stages_up_to_one(old: Path) -> None:
    assert taken(old, "run.take=feedback") == {"base_policy", "feedback.json"}


def test_feedback_that_is_still_in_the_stores_log_is_taken_over_too(old: Path) -> None:
    with FeedbackStore(old / "feedback.db") as live:
        live.add([make_pair(1)])
        assert taken(old, "run.take=feedback") == {"base_policy", "feedback.db", "feedback.json"}
        with FeedbackStore(old.parent / "new" / "feedback.db", read_only=True) as copied:
            assert copied.count() == 1


def test_a_run_without_a_base_policy_has_nothing_to_give(old: Path) -> None:
    for name in ("base_policy", "reward_model", "feedback.json"):
        (old / name).rename(old / f"{name}.elsewhere")
    with pytest.raises(InputError, match="no base policy yet"):
        taken(old)
    other = old.parent / "other"
    shutil.copytree(old, other)  # from which nothing keeps the run, for it holds nothing yet
    check_source(load_config(None, [f"run.root={old.parent}", "run.id=new", f"run.from={other}"]))


def test_a_head_size_that_the_engine_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="head size"):
        check_models(load_config(None, ["model.heads=8"]))
    check_models(load_config(None, ["model.heads=8", "resources.generator_gpus=1"]))


def test_feedback_of_another_recipe_is_refused(old: Path) -> None:
    """The default recipe's simulated annotators would judge among people, and nobody would see it."""
    with pytest.raises(ConfigError, match=r"feedback of recipe=dialogue.*-c .*config\.yaml does"):
        check_source(config(old, "run.take=feedback", "recipe=preferences", "data.path=x.jsonl"))
    check_source(config(old, "run.take=base_policy", "recipe=preferences", "data.path=x.jsonl"))
    check_source(config(old, "run.take=feedback"))


def test_a_refresh_needs_a_policy_before_anything_is_taken_over(old: Path) -> None:
    refresh = ("run.take=feedback", "reward_model.refresh=true")
    with pytest.raises(InputError, match=r"no policy yet: run `rlhf ppo -c .*config\.yaml`"):
        check_source(config(old, *refresh))
    (old / "policy").mkdir()
    check_source(config(old, *refresh))


def test_what_one_run_gave_is_not_gone_on_with_from_another(old: Path, tmp_path: Path) -> None:
    taken(old, "run.take=feedback")
    other = tmp_path / "other"
    shutil.copytree(old, other)
    later = load_config(None, [f"run.root={old.parent}", "run.id=new", f"run.from={other}"])
    with pytest.raises(ConfigError, match=r"holds results of .*, none of .*other: leave run\.from as it was"):
        check_source(later)
    check_source(config(old, "run.take=feedback"))
    shutil.move(old, tmp_path / "moved")  # what is gone cannot be meant
    check_source(later)


def test_a_penalty_for_doubt_needs_a_model_that_knows_it(tmp_path: Path) -> None:
    reward_model = new_reward_model(make_policy_folder(tmp_path / "base"), "decoder")
    reward_model.save(tmp_path / "sure")
    reward_model.save(tmp_path / "two")
    reward_model.save(tmp_path / "two" / MEMBERS / "1")

    def check(folder: str, uncertainty: float, *more: str) -> None:
        source = f"{{kind: model, paths: [{folder}], uncertainty: {uncertainty}}}"
        check_models(load_config(None, [f"rewards.sources.mine={source}", *more]))

    for folder, more in ((str(tmp_path / "sure"), ()), ("", (f"reward_model.path={tmp_path / 'sure'}",))):
        with pytest.raises(ConfigError, match=r"sources\.mine\.uncertainty is that of an ensemble"):
            check(folder, 1, *more)
        check(folder, 0, *more)
    check(str(tmp_path / "two"), 1)


def test_a_model_folder_of_such_a_head_size_is_refused_too(tmp_path: Path) -> None:
    folder = make_policy_folder(tmp_path / "policy", hidden=32, heads=2)
    with pytest.raises(ModelError, match="heads of size 16"):
        check_models(load_config(None, [f"model.path={folder}"]))
