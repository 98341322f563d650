"""The command itself, with Ray Serve: up, asked from outside, and down when it is told."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from rlhf_ray.models.reward import new_reward_model
from tests.on_serve.running import free_port
from tests.serving.runs import make_run

UP_WITHIN_S = 240


def rlhf(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "rlhf_ray.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=True).stdout


@contextmanager
def serving(cwd: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rlhf serve` until it answers, with its address; ended in the end however the test ends."""
    port = free_port()
    command = [sys.executable, "-m", "rlhf_ray.cli", "serve", *map(str, arguments), "--port", str(port)]
    log = (cwd / "serve.log").open("w")
    process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + UP_WITHIN_S
        while "serving on" not in (cwd / "serve.log").read_text():
            assert process.poll() is None, (cwd / "serve.log").read_text()
            assert time.monotonic() < end, (cwd / "serve.log").read_text()
            time.sleep(0.5)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
        log.close()


@pytest.mark.serve
@pytest.mark.timeout(400)
def test_a_run_is_served_kept_safe_by_keys_and_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with serving(tmp_path, run, "parts=[reward,feedback]") as (process, url):
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, set(ready.json()["parts"])) == (200, {"reward", "records"}), ready.text
        question = {"prompt": "my lamp arrived broken", "completions": ["we send a new one today", "no"]}
        first = httpx.post(f"{url}/v1/rewards", json=question)
        assert (first.status_code, first.json()["version"], len(first.json()["rewards"])) == (200, 1, 2), first.text
        judgement = {**question, "completions": ["no"], "rating": 2}
        assert httpx.post(f"{url}/v1/feedback", json=judgement).status_code == 201
        assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 404  # the policy is not served
        assert httpx.get(f"{url}/healthz", headers={"Host": "evil.org"}).status_code == 400

        app, trainer = (
            rlhf("keys", "create", role, "--role", role, cwd=tmp_path).strip() for role in ("app", "trainer")
        )
        assert httpx.post(f"{url}/v1/rewards", json=question).status_code == 401
        headers = {"Authorization": f"Bearer {app}"}
        assert httpx.post(f"{url}/v1/rewards", json=question, headers=headers).json() == first.json()
        assert httpx.post(f"{url}/v1/feedback", json=judgement, headers=headers).status_code == 403
        page = httpx.get(f"{url}/v1/feedback", headers={"Authorization": f"Bearer {trainer}"})
        assert [item["rating"]["value"] for item in page.json()["data"]] == [2.0]
        rlhf("keys", "revoke", "app", cwd=tmp_path)
        assert httpx.post(f"{url}/v1/rewards", json=question, headers=headers).status_code == 401

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
    assert "secret" not in (tmp_path / "serve.log").read_text()
    assert app not in (tmp_path / "serve.log").read_text()


@pytest.mark.serve
@pytest.mark.timeout(400)
def test_a_promoted_reward_model_is_taken_without_a_restart(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with serving(tmp_path, run, "parts=[reward]") as (_, url):
        question = {"prompt": "my lamp arrived broken", "completions": ["we send a new one today"]}
        first = httpx.post(f"{url}/v1/rewards", json=question).json()
        new_reward_model(run / "policy", "decoder", seed=7).save(run / "reward_model")
        rlhf("policies", "promote", run, "--kind", "reward_model", cwd=tmp_path)
        end = time.monotonic() + 30
        while (now := httpx.post(f"{url}/v1/rewards", json=question).json())["version"] != 2:
            assert time.monotonic() < end
            assert now == first
            time.sleep(0.2)
        assert now["rewards"] != first["rewards"]
        rlhf("policies", "rollback", "--kind", "reward_model", cwd=tmp_path)
        while (now := httpx.post(f"{url}/v1/rewards", json=question).json())["version"] != 1:
            assert time.monotonic() < end + 30
            time.sleep(0.2)
        assert now == first
