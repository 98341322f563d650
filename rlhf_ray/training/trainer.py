"""What a Trainer user knows, for our fits: TrainingArguments by their names, callbacks, and checkpoints to go on from.

A fit's folder holds Trainer's own `checkpoint-N` folders, with two files more in each: `best.safetensors`, the weights
of the best look, and `fit.json`, all else that the fit knows, which is written last. A checkpoint without it is one
that a crash cut short.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf_ray.config import FitConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.files import fsync
from rlhf_ray.plugins import load_plugin
from rlhf_ray.roles.ranks import rank_and_count

BEST, STATE = "best.safetensors", "fit.json"


@dataclass(frozen=True, slots=True)
class FitCheckpoint:
    """Where a fit that broke off can go on."""

    path: Path
    state: dict[str, Any]
    best_weights: dict[str, Tensor]


def training_arguments(config: FitConfig, *, steps: int, seed: int, folder: Path) -> TrainingArguments:
    """A fit's settings for Trainer; `ConfigError` where one of the user's own does not go with this machine."""
    accumulated, (_, ranks) = int(config.trainer.get("gradient_accumulation_steps", 1)), rank_and_count()
    parts = accumulated * ranks
    if config.batch_size % parts:
        shared = f" on {ranks} ranks" if ranks > 1 else ""
        raise ConfigError(
            f"trainer.gradient_accumulation_steps={accumulated}{shared} does not divide the {config.batch_size} items "
            "of a step"
        )
    arguments: dict[str, Any] = {
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "save_strategy": "steps" if "save_steps" in config.trainer else "no",  # "no": where the fit itself says so
        "save_total_limit": 2,  # the newest may be one that a crash cut short
        "logging_strategy": "steps" if "logging_steps" in config.trainer else "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "use_cpu": ranks > 1 and not torch.cuda.is_available(),  # or accelerate would not see the other ranks there
        **config.trainer,
    }
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size // parts,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            seed=seed,
            eval_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            remove_unused_columns=False,
            **arguments,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"transformers refuses trainer={config.trainer}: {error}") from None


def callbacks(names: tuple[str, ...]) -> list[TrainerCallback]:
    """One of each class; `ConfigError` for a path at which there is no `TrainerCallback`."""
    made = []
    for name in names:
        found = load_plugin(name, key="callbacks")
        if not (isinstance(found, type) and issubclass(found, TrainerCallback)):
            raise ConfigError(f"callbacks: {name} is no class of transformers.TrainerCallback")
        made.append(found())
    return made


def complete_checkpoint(path: Path, state: Mapping[str, Any], best_weights: dict[str, Tensor]) -> None:
    """Makes a folder that Trainer wrote one that `newest_checkpoint` finds."""
    save_file(best_weights, path / BEST)
    for file in path.iterdir():
        fsync(file)
    part = path / f".{STATE}"
    part.write_text(json.dumps(state), encoding="utf-8")
    fsync(part)
    part.replace(path / STATE)
    fsync(path)


def newest_checkpoint(folder: Path, identity: str) -> FitCheckpoint | None:
    """The newest whole checkpoint of the fit that `identity` names; None where there is none."""
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / STATE).exists()]
    for path in sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["identity"] == identity:
            return FitCheckpoint(path, state, load_file(path / BEST))
    return None


def drop_checkpoints(folder: Path) -> None:
    """Once a fit's result is safe elsewhere; what callbacks wrote beside the checkpoints stays."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
