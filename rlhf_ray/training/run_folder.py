"""A run's folder: who may write to it, what lies where, and which stages are done.

A stage writes its result into a folder or file that appears whole or not at all, so its presence means that it is
done; the same command on the same folder goes on with the first stage that is missing.
"""

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any, Self, TextIO

import yaml

from rlhf_ray.config import Config, dump_config, known_keys, load_config
from rlhf_ray.errors import ConfigError, InputError

MAY_CHANGE = (
    "ppo.steps", "rollout.min_generators", "checkpoint", "resources", "run", "evaluate", "rewards.replacements",
)  # fmt: skip
"""Keys that a resumed run may be given anew; everything else would make it another run."""
HOW_TO_ASK = frozenset({"url", "key_env", "concurrency", "deadline_s", "patience_s", "batch"})
"""Keys of a source of rewards that say where a service is and how it is asked, not what it is: it may move."""


GENERATORS = "generators.json"
"""How many engines `rlhf scale` asked for."""
BEST = "best.json"
"""Which look at held-out prompts did best, and by whom."""
PROFILE, TRACE = "profile.json", "trace.json"
"""What `rlhf profile` saw: for the report, and for a trace viewer."""


class RunFolder:
    """`runs/<run_id>/`, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base_policy = path / "base_policy"
        self.pretrained = path / "pretrained"
        self.reward_model = path / "reward_model"
        self.direct_policy = path / "direct_policy"
        self.judge = path / "judge"
        self.best_policy = path / "best_policy"
        self.policy = path / "policy"
        self.checkpoints = path / "checkpoints"
        self.fits = path / "fits"
        self.feedback_db = path / "feedback.db"
        self._lock: TextIO | None = None

    @classmethod
    def open(cls, config: Config) -> Self:
        """The folder of `config.run.id`, made if need be, locked, with the resolved config saved in it.

        Raises `ConfigError` where the folder belongs to another config or another process.
        """
        assert config.run.id is not None, "the caller names the run"
        folder = cls(config.run.root / config.run.id)
        saved = folder.path / "config.yaml"
        if saved.exists():
            _refuse_changes(load_config(saved), config, folder.path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {folder.path}: {error.strerror}; set run.root") from None
        folder._take_lock()
        write_whole(saved, dump_config(config))
        return folder

    def store(self, config: Config) -> str:
        """Where the feedback of this run, whose config that is, lies."""
        return str(config.feedback.store or self.feedback_db)

    @property
    def wanted_generators(self) -> int | None:
        """How many somebody asked for while the run goes on, or before it was resumed; None: as the config says."""
        wanted: dict[str, int] | None = self.read_json(GENERATORS)
        return None if wanted is None else wanted["wanted"]

    def want_generators(self, wanted: int) -> None:
        """Asks a run that shares rollouts out by load for another number of generators, from its next step on.

        `InputError` where it cannot be done.
        """
        config = load_config(self.path / "config.yaml")
        minimum, most = config.rollout.min_generators, config.rollout.generators
        if minimum is None or minimum == most:
            raise InputError(
                f"{self.path} gives each rollout its fixed engine; a run that may be scaled is started with "
                "rollout.min_generators below rollout.generators"
            )
        if wanted < minimum:
            raise InputError(f"{self.path} does not go on with fewer than rollout.min_generators={minimum}")
        if config.resources.address is None and wanted > most:
            raise InputError(f"{self.path} runs on a Ray of its own, which has seats for {most} generators")
        self.write_json(GENERATORS, {"wanted": wanted})

    def close(self) -> None:
        """Lets another process have it."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def write_json(self, name: str, content: Any) -> None:
        """A JSON file that appears whole."""
        write_whole(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, or None where it is not there yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            raise ConfigError(
                f"run {self.path} is being written by process {holder}; wait for it, stop it, or set another run.id"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def existing_run(path: Path) -> tuple[RunFolder, Config]:
    """A run that was made before, and its config; for commands that read it."""
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is not a run folder (no config.yaml in it); give the path of one, like runs/demo")
    return RunFolder(path), load_config(path / "config.yaml")


def _refuse_changes(old: Config, new: Config, path: Path) -> None:
    trees = [yaml.safe_load(dump_config(config)) for config in (old, new)]
    for source in (source for tree in trees for source in tree["rewards"]["sources"].values()):
        for key in HOW_TO_ASK & source.keys():
            del source[key]
    keys = list(known_keys(Config))
    changed = [
        key
        for key in keys
        if not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
        and not any(other.startswith(f"{key}.") for other in keys)
        and _get(trees[0], key) != _get(trees[1], key)
    ]
    if changed:
        shown = ", ".join(f"{key} ({_get(trees[0], key)} -> {_get(trees[1], key)})" for key in changed[:3])
        raise ConfigError(
            f"{path} was made with another config: {shown}; set another run.id to start a new run, and to keep what is "
            f"done here run.from={path} with run.take, the last stage to keep: base_policy, feedback or reward_model"
        )


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
