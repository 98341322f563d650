"""`rlhf --help` answers at once, because the door imports nothing heavy."""

import subprocess
import sys
import time

HEAVY = ("torch", "ray", "vllm", "transformers", "sqlalchemy", "numpy", "pydantic")
WITHIN_S = 0.5
HELP = "import sys; sys.argv = ['rlhf', '--help']; from rlhf_ray.cli import main; main()"


def seconds_for_help() -> float:
    """Wall-clock seconds of `rlhf --help` in a fresh process."""
    started = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    elapsed = time.perf_counter() - started
    assert answer.returncode == 0, answer.stderr
    assert "demo" in answer.stdout
    return elapsed


def test_help_answers_in_under_half_a_second() -> None:
    tries: list[float] = []
    while len(tries) < 7 and min(tries, default=WITHIN_S) >= WITHIN_S:  # a neighbour's work can only make it slower
        tries.append(seconds_for_help())
    assert min(tries) < WITHIN_S, tries


def test_the_door_imports_nothing_heavy() -> None:
    script = f"import rlhf_ray.cli, sys; print([name for name in {HEAVY} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_what_lists_versions_and_what_opens_the_service_need_no_torch() -> None:
    script = "import rlhf_ray.models.registry, rlhf_ray.serving.app, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "False"
