"""Before a run's first stage: models that can be used, and what another run has to give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.models.ensemble import load_ensemble
from rlhf_ray.models.files import CPU_HEAD_SIZES, check_cpu_attention
from rlhf_ray.models.policy import load_policy
from rlhf_ray.rewards.combined import read_keys
from rlhf_ray.rewards.function import load_function
from rlhf_ray.roles.environment import load_environment
from rlhf_ray.sqlite import copy_database
from rlhf_ray.training.run_folder import RunFolder, existing_run, write_whole

TAKEN_OVER = {
    "base_policy": ("pretrained", "base_policy", "base.json"),
    "feedback": ("feedback.db", "feedback.json"),
    "reward_model": ("reward_model", "reward_model.json", "judge", "judge.json"),
}
"""What each stage leaves that `run.from` may give, in their order."""


TAKEN_FROM = "taken_from.json"
"""Which run the results are from that a run has taken over."""


def check_models(config: Config) -> None:
    """Refuses a model folder, or a size, that cannot be used, before any work is done."""
    on_cpu = config.resources.generator_gpus == 0
    if config.model.path is not None:
        load_policy(config.model.path)
        if on_cpu:
            check_cpu_attention(config.model.path)
    elif on_cpu and config.model.hidden // config.model.heads not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"model.hidden={config.model.hidden} over model.heads={config.model.heads} is a head size that vLLM's CPU "
            f"attention does not have; it has {', '.join(map(str, CPU_HEAD_SIZES))}"
        )
    own = config.reward_model.path
    if own is not None:
        load_ensemble(own)
    if config.rollout.environment is not None:
        load_environment(config.rollout.environment)
    read_keys(config.rewards)
    for name, source in config.rewards.sources.items():
        if source.kind == "model":
            folders = source.paths or ([] if own is None else [own])
            members = [member for folder in folders for member in load_ensemble(folder).members]
            if source.uncertainty and len(members) == 1 and not members[0].has_heads:
                raise ConfigError(
                    f"rewards.sources.{name}.uncertainty is that of an ensemble, and the reward model in {folders[0]} "
                    "does not know how sure it is: it has neither several heads nor members; leave it out"
                )
        if source.kind == "function":
            load_function(source.of)


def check_source(config: Config) -> None:
    """Refuses a `run.from` that cannot give what this run wants of it."""
    if config.run.from_ is None:
        return
    source, theirs = existing_run(config.run.from_)
    folder = RunFolder(config.run.root / str(config.run.id))
    before = folder.read_json(TAKEN_FROM)
    if before is not None and Path(before) != source.path.resolve() and Path(before).exists():
        raise ConfigError(
            f"{folder.path} holds results of {before}, none of {source.path}: leave run.from as it was, or set another "
            "run.id"
        )
    if config.run.take == "feedback" and theirs.recipe != config.recipe:
        raise ConfigError(
            f"run.from={source.path} has feedback of recipe={theirs.recipe}, and this run is recipe={config.recipe}: "
            f"set recipe, data and model as that run has them; -c {source.path / 'config.yaml'} does"
        )
    if config.reward_model.refresh:
        trained_policy(source)


def trained_policy(source: RunFolder) -> Path:
    """The one that a run has trained; `InputError` where it has not yet."""
    if not source.policy.is_dir():
        raise InputError(
            f"run.from={source.path} has trained no policy yet: run `rlhf ppo -c {source.path / 'config.yaml'}`, "
            "which goes on where that run ended, and then this command again"
        )
    return source.policy


def take_over(config: Config, folder: RunFolder, *, say: Callable[[str], None]) -> None:
    """Copies from `run.from` what this run does not have yet."""
    if config.run.from_ is None:
        return
    source, _ = existing_run(config.run.from_)
    stages = list(TAKEN_OVER)
    taken = []
    for name in (name for stage in stages[: stages.index(config.run.take) + 1] for name in TAKEN_OVER[stage]):
        old, new = source.path / name, folder.path / name
        if old.exists() and not new.exists():
            part = folder.path / f".{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            _copy(old, part)
            folder.write_json(TAKEN_FROM, str(source.path.resolve()))
            part.rename(new)
            taken.append(name)
    if not folder.base_policy.exists():
        raise InputError(f"run.from={config.run.from_} has no base policy yet; run its command again first")
    if taken:
        say(f"from {source.path}: {', '.join(taken)}")


def _copy(old: Path, new: Path) -> None:
    if old.is_dir():
        shutil.copytree(old, new)
    elif old.name == "feedback.json":
        record = json.loads(old.read_text(encoding="utf-8"))
        record.pop("refreshed_from", None)  # the other run's refresh: this one may ask for its own
        write_whole(new, json.dumps(record, indent=2) + "\n")
    elif old.suffix == ".db":
        copy_database(old, new)
    else:
        shutil.copy2(old, new)
