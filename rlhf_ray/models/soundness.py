"""Whether a version could be served: it is loaded once, and every weight looked at, before it gets its number."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from rlhf_ray.errors import ModelError
from rlhf_ray.models.ensemble import load_ensemble
from rlhf_ray.models.policy import load_policy

if TYPE_CHECKING:
    from rlhf_ray.models.registry import Kind


def refuse_unusable(folder: Path, kind: "Kind") -> None:
    """`ModelError` for what does not load, or has weights that are not finite."""
    if kind == "policy":
        load_policy(folder)
    else:
        load_ensemble(folder)
    for name, tensor in _tensors(folder):
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            word = kind.replace("_", " ")
            raise ModelError(f"{word} has weights that are not finite ({name}): it was not published")


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(str(path), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield name, opened.get_tensor(name)
