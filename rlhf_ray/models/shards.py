"""Weights read from a model folder row by row into a model that has none yet, so that no rank holds the whole."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from rlhf_ray.models.critic import HEADS
from rlhf_ray.models.folder import explained, quiet_transformers

Read = Callable[[int, int], Tensor]
"""Some rows of a weight on the disk, from the first up to but not with the second."""


def empty_model(auto_class: Any, path: Path, use: str, *, config: Any = None) -> PreTrainedModel | None:
    """The model of a folder without weights; None where the files name them otherwise than the model does, as they do
    where it keeps them in another form in memory: that one has to be loaded whole.
    """
    with explained(path, use), quiet_transformers():
        config = config or AutoConfig.from_pretrained(str(path), local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        model.tie_weights()
        there = _files(path)
    own = model.state_dict().keys() - model.all_tied_weights_keys
    named = all(name in there or _is_head(name) for name in own)
    return model.eval() if named else None


def fill(model: PreTrainedModel, path: Path, shard: Callable[[Tensor, Read], Tensor]) -> None:
    """Gives an empty model its weights: `shard(like, read)` reads what of a weight is wanted. A new head is 0."""
    files, filled = _files(path), {}
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(path / file, framework="pt")) for file in sorted(set(files.values()))
        }
        made: dict[int, nn.Parameter] = {}  # tied ones are one parameter with two names
        for name, like in model.named_parameters(remove_duplicate=False):
            if id(like) not in made:
                read = _reader(opened[files[name]], name) if name in files else _zeros(like)
                made[id(like)] = nn.Parameter(shard(like, read), requires_grad=like.requires_grad)
            filled[name] = made[id(like)]
    model.load_state_dict(filled, strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters()), "a weight was left out"


def _reader(file: Any, name: str) -> Read:
    weight = file.get_slice(name)

    def read(start: int, stop: int) -> Tensor:
        rows: Tensor = weight[start:stop]
        return rows

    return read


def _zeros(like: Tensor) -> Read:
    return lambda start, stop: torch.zeros(stop - start, *like.shape[1:])


def _files(path: Path) -> dict[str, str]:
    """Which file each weight lies in."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return weight_map
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _is_head(name: str) -> bool:
    return name.split(".")[0] in HEADS
