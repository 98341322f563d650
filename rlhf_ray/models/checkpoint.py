"""A run's checkpoints: safetensors and JSON, hashed, and either whole or not there.

A checkpoint is a folder `step_00000010`. It is written under another name, every file reaches the disk before
`manifest.json`, which lists their sizes and sha256, and only then does the folder get its name. What a crash leaves
behind is never taken for a checkpoint.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from rlhf_ray.errors import NoValidCheckpoint
from rlhf_ray.models.files import fsync

SCHEMA = 1
SPARE = 1.2
"""Share of a checkpoint's size that must be free before it is begun."""
_WHOLE = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(tmp|old)-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `newest_valid` found."""

    step: int
    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    """Groups of tensors, as they were given to `save_checkpoint`."""
    state: dict[str, Any]
    passed_over: tuple[str, ...]
    """Newer checkpoints that did not verify: one line each, path and reason."""


def save_checkpoint(
    folder: Path, step: int, *, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> Path:
    """Writes `folder/step_<step>`, durable on return; `OSError` (ENOSPC where the disk is full) leaves no trace.

    Each group of `tensors` becomes one safetensors file, one after the other in memory; `state` is JSON without NaN and
    infinity.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{step:08d}"
    told = _json(state)
    _check_space(folder, len(told) + sum(x.nbytes for members in tensors.values() for x in members.values()))
    token = secrets.token_hex(4)
    new = folder / f"{target.name}.tmp-{token}"
    try:
        new.mkdir()
        files = {
            f"{group}.safetensors": _write(new / f"{group}.safetensors", save(_apart(members)))
            for group, members in tensors.items()
        }
        files["state.json"] = _write(new / "state.json", told)
        _write(new / "manifest.json", _signed({"schema": SCHEMA, "step": step, "files": files}))
        fsync(new)
        if target.exists():  # one that did not verify, and whose step was reached again
            target.rename(folder / f"{target.name}.old-{token}")
        new.rename(target)
        fsync(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(folder / f"{target.name}.old-{token}", ignore_errors=True)
    return target


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None where there never was one.

    Raises `NoValidCheckpoint` where there are some and none verifies: a run never starts over silently.
    """
    passed_over: list[str] = []
    for path in _newest_first(folder):
        try:
            step, names = _verify(path)
            tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in names}
            state = json.loads((path / "state.json").read_bytes())
        except (_Invalid, OSError) as reason:
            passed_over.append(f"{path}: {reason}")
        else:
            return Checkpoint(step, path, tensors, state, tuple(passed_over))
    if passed_over:
        raise NoValidCheckpoint(
            f"none of the {len(passed_over)} checkpoints in {folder} can be used: {'; '.join(passed_over)}. "
            "Restore one from a backup, or remove them to start over"
        )
    return None


def prune(folder: Path, keep: int, *, best: int | None = None) -> list[Path]:
    """Deletes what is older than the newest `keep` checkpoints that verify, and a crash's leftovers.

    Deletes no checkpoint before `keep` newer ones have verified. The newest one that verifies and is not past the step
    `best` stays too: from there one comes to the best step again. Returns what it deleted.
    """
    assert keep >= 1
    valid, deleted, sought = 0, [], best is not None
    for path in _newest_first(folder):
        leads_to_best = sought and best is not None and _step_of(path) <= best and _is_valid(path)
        sought = sought and not leads_to_best
        if leads_to_best:
            valid += 1
        elif valid >= keep:
            # renamed first, so that one half deleted is not found as a broken checkpoint
            doomed = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
            path.rename(doomed)
            deleted.append(path)
        else:
            valid += _is_valid(path)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return deleted


class _Invalid(Exception):
    """Why a checkpoint does not verify."""


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _WHOLE.fullmatch(path.name)]
    yield from sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _is_valid(path: Path) -> bool:
    try:
        _verify(path)
    except (_Invalid, OSError):
        return False
    return True


def _verify(path: Path) -> tuple[int, list[str]]:
    """The step and the names of the tensor files of a checkpoint of which every byte is as it was written."""
    manifest = _read_manifest(path / "manifest.json")
    if path.name != f"step_{manifest['step']:08d}":
        raise _Invalid(f"manifest.json is of step {manifest['step']}")
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise _Invalid(f"{name} is missing")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise _Invalid(f"{name} has {size} bytes, not {expected['bytes']}")
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise _Invalid(f"{name} does not match its sha256")
    return manifest["step"], [name for name in manifest["files"] if name.endswith(".safetensors")]


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _Invalid("manifest.json is missing")
    data = path.read_bytes()
    if not data:
        raise _Invalid("manifest.json is empty")
    try:
        manifest: dict[str, Any] = json.loads(data)
        unsigned = {key: manifest[key] for key in ("schema", "step", "files")}
    except (ValueError, TypeError, KeyError):
        raise _Invalid("manifest.json is not a manifest") from None
    if _signed(unsigned) != data:
        raise _Invalid("manifest.json does not match its own sha256")
    if manifest["schema"] != SCHEMA:
        raise _Invalid(f"manifest.json has schema {manifest['schema']}; this program reads {SCHEMA}")
    return manifest


def _signed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes, its own sha256 included, so that no changed bit of it goes unseen either."""
    return _json({**manifest, "sha256": hashlib.sha256(_json(manifest)).hexdigest()})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU and none in another's memory, as tied embeddings are, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        where = own.untyped_storage().data_ptr()
        shared = where in seen or own.untyped_storage().nbytes() != own.nbytes
        seen.add(where)
        apart[name] = own.clone() if shared else own
    return apart


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size * SPARE:
        raise OSError(
            errno.ENOSPC, f"a checkpoint of {size / 2**20:.1f} MiB needs more than the {free / 2**20:.1f} MiB free"
        )


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Durable on return; what the manifest says of it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
