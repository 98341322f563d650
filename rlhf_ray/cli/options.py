"""What commands of every kind take, and the config that comes of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

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


def print_json(content: Any) -> None:
    """For programs that read it."""
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))
