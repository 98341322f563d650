"""What commands of every kind take, and the config that comes of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from rlhf_ray.config import Config
    from rlhf_ray.training.stages import Stage

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


def run_until(config: "Config", until: "Stage") -> Path:
    """Runs the stages up to one of them, and returns the run's folder."""
    if config.resources.address is not None:
        from rlhf_ray.plan import require_room

        typer.echo(require_room(config))
    typer.echo("loading torch and transformers")  # seconds in which nothing else would be seen
    from rlhf_ray.training.stages import run_stages

    return run_stages(config, until=until, say=lambda line: typer.echo(line))


def print_json(content: Any) -> None:
    """For programs that read it."""
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))
