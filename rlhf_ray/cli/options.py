"""What commands of every kind take, and the config that comes of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rlhf_ray.config import Config

ConfigFile = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("-c", "--config", help="YAML file of settings; without it the built-in demo.", metavar="FILE.yaml"),
]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="Settings that win over the file: dotted.key=value")]  # noqa: UP045
Run = Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.")]


def load(config: Path | None, overrides: list[str] | None) -> "Config":
    """The resolved config of a file and overrides."""
    from rlhf_ray.config import load_config

    return load_config(config, overrides or [])
