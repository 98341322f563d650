"""One line chooses an algorithm; what a config says itself wins."""

from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf_ray.config import Advantage, Config, PolicyLoss, dump_config, known_keys, load_config
from rlhf_ray.config.presets import BY_ADVANTAGE, BY_LOSS, BY_METHOD, GROUPED, with_presets
from rlhf_ray.errors import ConfigError


def value(config: Config, path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        found = getattr(found, key)
    return found


def test_every_algorithm_has_its_presets_and_they_name_known_keys() -> None:
    assert list(BY_ADVANTAGE) == list(get_args(Advantage))
    assert list(BY_LOSS) == list(get_args(PolicyLoss))
    assert list(BY_METHOD) == list(get_args(Config.model_fields["method"].annotation))
    named = {path for presets in (*BY_ADVANTAGE.values(), *BY_LOSS.values(), *BY_METHOD.values()) for path in presets}
    assert named <= set(known_keys(Config))


@pytest.mark.parametrize("name", get_args(Advantage))
def test_one_line_is_enough_and_a_step_keeps_its_size(name: str) -> None:
    config = load_config(None, [f"ppo.advantage={name}"])
    assert config.rollout.prompts * config.rollout.samples == 128
    assert (config.rollout.samples > 1) == (name in GROUPED)
    for path, preset in BY_ADVANTAGE[name].items():
        assert value(config, path) == preset


def test_what_the_config_says_wins_and_the_loss_before_the_advantage() -> None:
    config = load_config(None, ["ppo.advantage=dr_grpo", "ppo.loss=gspo", "rollout.samples=8", "ppo.clip=0.01"])
    assert (config.rollout.samples, config.rollout.prompts, config.ppo.clip) == (8, 32, 0.01)
    assert (config.ppo.average, config.ppo.clip_high) == ("sequence", 4e-4)


def test_a_resolved_config_is_not_resolved_anew() -> None:
    tree = with_presets({"ppo": {"advantage": "grpo", "average": "token"}})
    assert with_presets(tree) == tree


@pytest.mark.parametrize("first", get_args(Advantage))
@pytest.mark.parametrize("second", get_args(Advantage))
def test_another_algorithm_on_the_command_line_brings_its_own_over_a_runs_config(
    tmp_path: Path, first: str, second: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(load_config(None, [f"ppo.advantage={first}", "ppo.lam=0.5", "run.id=x"])))
    changed = load_config(file, [f"ppo.advantage={second}"])
    assert changed == load_config(None, [f"ppo.advantage={second}", "ppo.lam=0.5", "run.id=x"])


@pytest.mark.parametrize("first", BY_METHOD)
@pytest.mark.parametrize("second", BY_METHOD)
def test_so_does_another_method(tmp_path: Path, first: str, second: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(load_config(None, [f"method={first}", "direct.pairs=7", "run.id=x"])))
    assert load_config(file, [f"method={second}"]) == load_config(
        None, [f"method={second}", "direct.pairs=7", "run.id=x"]
    )


def test_what_a_file_says_for_itself_stays_when_the_algorithm_changes(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("ppo: {advantage: grpo, average: constant, loss: gspo, clip: 0.01}\nrollout: {samples: 8}\n")
    changed = load_config(file, ["ppo.advantage=rloo"])
    assert (changed.ppo.average, changed.ppo.loss, changed.rollout.samples) == ("constant", "gspo", 8)
    assert (changed.ppo.kl.where, changed.ppo.clip, changed.ppo.clip_high) == ("reward", 0.01, 4e-4)


def test_a_tree_that_is_none_is_left_to_be_refused() -> None:
    for tree in ({"ppo": 3}, {"ppo": {"advantage": ["x"]}}, {"ppo": {"advantage": "grpo", "kl": 1}, "rollout": None}):
        before = repr(tree)
        with_presets(tree)
        assert repr(tree) == before
        with pytest.raises(Exception, match="validation error"):
            Config.model_validate(tree)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["ppo.advantage=grpo", "rollout.samples=1"], "rollout.samples to 2"),
        (["rollout.dynamic_sampling=2"], "rollout.samples to 2"),
        (["ppo.whiten=group"], "rollout.samples to 2"),
        (["ppo.kl.where=loss"], "estimator=k2 or k3"),
        (["ppo.advantage=rloo", "ppo.critic_warmup=2"], "critic_warmup is a critic's"),
        (["ppo.advantage=remax", "ppo.reward_norm=batch"], "reward_norm=running or none"),
        (["ppo.advantage=grpp"], "'grpo'"),
        (["lora.rank=4", "method=dpo"], "method=rl"),
        (["lora.rank=4", "ppo.kl.refresh_every=5"], "refresh_every"),
        (["ppo.critic_from=reward_model", "reward_model.backbone=encoder"], "backbone=decoder"),
        (["resources.learner_dtype=bfloat16"], "set rollout.tolerance=0.1"),
        (["lora.quantised=true"], "set lora.rank"),
        (["lora.rank=4", "resources.learner_offload=[reference]"], "leave it out with lora.rank"),
        (["resources.optimizer_bits=8", "resources.learner_ranks=2"], "learner_ranks=1"),
        (["resources.optimizer_bits=8", "resources.learner_offload=[optimizer]"], "out of resources.learner_offload"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_way_out(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, settings)
