"""The config tree: what it accepts, and how it says no."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from rlhf_ray.config import Config, dump_config, load_config
from rlhf_ray.config.fits import SAID_BY, TRAINER_ARGUMENTS
from rlhf_ray.errors import ConfigError


def test_the_defaults_are_a_whole_config() -> None:
    assert load_config() == Config()


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["run.id=x", "run.from=runs/other", "ppo.kl.target=6", "reward_model.backbone=encoder"])
    path = tmp_path / "x.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("ppo: {steps: 7, epochs: 3}\n")
    config = load_config(path, ["ppo.steps=9"])
    assert (config.ppo.steps, config.ppo.epochs) == (9, 3)


def test_the_run_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "My run.yaml"
    path.write_text("seed: 3\n")
    assert load_config(path).run.id == "my-run"


@pytest.mark.parametrize(("wrong", "near"), [("ppo.kl.coeff=1", "ppo.kl.coef"), ("rollouts.top_p=1", "rollout")])
def test_an_unknown_key_names_the_nearest_known_one(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest known key: '{near}"):
        load_config(None, [wrong])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.steps", "dotted.key=value"),
        ("ppo.steps=0", "ppo.steps"),
        ("ppo.clip=wide", "ppo.clip"),
        ("seed.x=1", "seed"),
        ("run.id=../up", "run.id"),
        ("ppo.minibatch=33", "ppo.minibatch=33 does not divide"),
        ("rollout.max_tokens=900", "leaves no room"),
        ("model.heads=3", "model.heads=3"),
        ("recipe=preferences", "needs data.path"),
        ("data.prompts=100", "data.held_out"),
        ("ppo.advantage=magic", "ppo.advantage"),
        ("seed={", "not YAML"),
        ("sft.trainer.max_steps=9", "max_steps is said by max_epochs here"),
        ("sft.trainer.optimizer=lion", "the nearest is optim"),
        ("direct.trainer.warmup_steps=9", "warmup_steps needs lr_scheduler_type beside it"),
        ("resources.engine_dtype=bfloat16", r"set rollout\.tolerance=0\.1 or more"),
        ("resources.engine_tensor_parallel=2", r"needs resources\.generator_gpus=2, not 0"),
        ("resources.engine_sleep=true", "for engines on a GPU"),
        ("rollout.min_generators=2", "rollout.min_generators=2 are more than rollout.generators=1"),
    ],
)
def test_an_impossible_value_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, [override])


def test_a_fixed_map_of_rollouts_to_generators_needs_all_of_them() -> None:
    few = ["rollout.generators=3", "rollout.min_generators=1"]
    assert load_config(None, few).rollout.min_generators == 1
    with pytest.raises(ConfigError, match=r"rollout\.min_generators=1 shares rollouts out by load"):
        load_config(None, [*few, "deterministic=true"])
    load_config(None, [*few, "rollout.min_generators=3", "deterministic=true"])


def test_an_override_of_one_field_leaves_the_other_defaults_of_its_section_alone() -> None:
    for section in ("pretrain", "sft"):
        before = getattr(load_config(), section)
        after = getattr(load_config(None, [f"{section}.batch_size=7"]), section)
        assert after == before.model_copy(update={"batch_size": 7})
    fit = load_config(None, ["reward_model.fit.batch_size=7"]).reward_model.fit
    assert fit == load_config().reward_model.fit.model_copy(update={"batch_size": 7})


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert load_config(None, ["ppo.learning_rate=1e-4"]).ppo.learning_rate == 1e-4


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "\t: x"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml")


JOBS = Path(__file__).parents[2] / "deployments" / "jobs"
NEEDS = {"hh": ["data.path=/d"], "gpu": ["data.path=/d", "model.path=/m"]}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_run_configs_that_are_shipped_are_valid_and_named_for_their_files(path: Path) -> None:
    assert load_config(path, NEEDS.get(path.stem, [])).run.id == path.stem


def test_there_is_a_run_config_for_each_size_of_machine() -> None:
    assert {path.stem for path in JOBS.glob("*.yaml")} >= {"laptop", "hh", "gpu", "cluster"}


def test_on_the_gpu_box_the_roles_share_the_one_gpu() -> None:
    resources = load_config(JOBS / "gpu.yaml", NEEDS["gpu"]).resources
    assert 0 < resources.generator_gpus + resources.learner_gpus + resources.scorer_gpus <= 1


def test_trainer_arguments_are_transformers_own() -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TRAINER_ARGUMENTS) <= names
    assert not set(TRAINER_ARGUMENTS) & set(SAID_BY)
    fit = load_config(None, ["sft.trainer.bf16=true", "sft.trainer.adam_beta2=0.99"]).sft
    assert fit.trainer == {"bf16": True, "adam_beta2": 0.99}
