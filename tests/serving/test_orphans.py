"""No engine outlives its replica."""

import os
import signal
import subprocess
import sys
import time

CHILD = (
    "import time; from rlhf_ray.serving.orphans import end_with_parent; end_with_parent(every_s=0.1); time.sleep(60)"
)
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(child.pid, flush=True)
child.wait()
"""


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    try:
        time.sleep(1)
        assert runs(child)
        parent.kill()
        parent.wait(10)
        deadline = time.monotonic() + 10
        while runs(child) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not runs(child)
    finally:
        parent.stdout.close()
        if runs(child):
            os.kill(child, signal.SIGKILL)
