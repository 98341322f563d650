"""What a model folder may hold, looked at without torch, so that the registry and `rlhf policies` start at once."""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ModelError

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM 0.32's attention on CPU is built for; another size would fail in the first batch."""

MEMBERS = "members"
"""Folder in a reward model's own that holds the others of its ensemble."""


def members_of(path: Path) -> list[Path]:
    """The folders of an ensemble: the reward model's own, and those of its other members, where it has some."""
    return [path, *sorted((path / MEMBERS).glob("*"))]


def read_folder(path: Path, use: str) -> dict[str, Any]:
    """The parsed `config.json` of a model folder whose files may be loaded: local, safetensors, no code of its own."""
    if not path.is_dir():
        raise ModelError(f"no {use} at {path}: give a folder that save_pretrained wrote")
    config = _read_json(path / "config.json", use)
    tokenizer_config = path / "tokenizer_config.json"
    for parsed in (config, _read_json(tokenizer_config, use) if tokenizer_config.exists() else {}):
        if "auto_map" in parsed:
            raise ModelError(f"{use} {path} wants to run Python code of its own (auto_map); use a model without it")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{use} {path} holds no *.safetensors weights; save it again with save_pretrained")
    return config


def check_cpu_attention(path: Path) -> None:
    """`ModelError` for a policy folder whose attention heads are of a size that vLLM has no CPU attention for."""
    config = _read_json(path / "config.json", "policy")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    size = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if size is not None and size not in CPU_HEAD_SIZES:
        raise ModelError(
            f"policy {path} has attention heads of size {size}, for which vLLM's CPU attention is not built; it is for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: take another model, or a GPU"
        )


def fsync(path: Path) -> None:
    """Returns once a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path, use: str) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{use} {path.parent} has no {path.name}: give a folder that save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(parsed, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return parsed
