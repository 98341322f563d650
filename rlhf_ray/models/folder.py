"""Plain Hugging Face folders: loaded whole or not at all, never left half-written."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from rlhf_ray.errors import ModelError
from rlhf_ray.models.files import fsync


class Saveable(Protocol):
    """A model or a tokenizer: what `save_folder` writes."""

    def save_pretrained(self, save_directory: str, /) -> Any:
        """Writes its files into a folder."""


def load_weights(auto_class: Any, path: Path, use: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model of a checked folder, in evaluation mode; every weight comes from the files. `options` as in
    `from_pretrained`.
    """
    with explained(path, use), quiet_transformers():
        model, info = auto_class.from_pretrained(
            str(path), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    if info["missing_keys"]:  # transformers fills these with random numbers and goes on
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{path} is not a whole {use}: it has no weights for {missing[0]} ({len(missing)} missing)")
    return model.eval()


@contextlib.contextmanager
def explained(path: Path, use: str) -> Iterator[None]:
    """Turns what transformers raises for a bad folder into a one-line `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load {use} {path}: {first_line}; save it again with save_pretrained") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' bars and load reports out of a job's log; what matters in them is an error here."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def save_folder(folder: Path, *parts: Saveable) -> None:
    """Writes models and tokenizers into `folder`, which appears whole or not at all; an old one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{kind}-{token}") for kind in ("tmp", "old"))
    try:
        new.mkdir()
        with quiet_transformers():
            for part in parts:
                part.save_pretrained(str(new))
        for path in (*new.rglob("*"), new):
            fsync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
