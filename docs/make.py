"""Writes docs/commands.md and docs/configuration.md from the code: `make docs`."""

import subprocess
import sys
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config.reference import reference
from rlhf_ray.serving.settings import ServiceConfig

HERE = Path(__file__).parent
CONFIGURATION = """\
# Configuration

Every key of a run, then every key of a service, with what it takes, its default and what it does. A run takes them
from a YAML file (`-c FILE.yaml`, sections nested) and from dotted overrides on the command line, the later winning;
`rlhf config show` prints what came of it, and `runs/<run_id>/config.yaml` keeps it. Made by `make docs`; do not edit.

# A run

{run}
# A service

For `rlhf serve RUN key=value ...` and as `args` in `deployments/serve/*.yaml`.

{service}"""


def commands() -> str:
    """Every command with its arguments and options."""
    writer = [sys.executable, "-m", "typer", "rlhf_ray.cli", "utils", "docs", "--name", "rlhf"]
    return subprocess.run(writer, capture_output=True, text=True, check=True, timeout=120).stdout.strip() + "\n"


def configuration() -> str:
    """Every key of a run and of a service."""
    return CONFIGURATION.format(run=reference(Config), service=reference(ServiceConfig))


if __name__ == "__main__":
    (HERE / "commands.md").write_text(commands(), encoding="utf-8")
    (HERE / "configuration.md").write_text(configuration(), encoding="utf-8")
