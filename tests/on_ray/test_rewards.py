"""A whole run whose rewards come from a service, a judge and a function of the user's, with faults planted."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.training.metrics import read_metrics
from tests.on_ray.test_run import command
from tests.rewards.servers import behaving, raw, said

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
PERIOD = "tests.rewards.test_combined:ending_in_a_period"


def answer(_: int, body: dict[str, Any]) -> Any:
    """A service that likes the letter e and a judge that likes short answers; every sixth request goes wrong."""
    if random.random() < 1 / 6:
        return random.choice([said({}, 500), raw(b"<html>"), said({"rewards": [float("inf")]}, 502)])
    if "query" in body:
        return said({"rewards": [text.split("assistant: ")[-1].count("e") / 10 for text in body["query"]]})
    text = json.loads(body["messages"][1]["content"])[-1]["content"]
    mark = 9 if len(text) < 60 else 2
    return said({"choices": [{"message": {"content": f"It has {len(text)} characters.\nMark: {mark}"}}]})


def test_a_run_learns_from_a_service_a_judge_and_a_function_without_a_reward_model(tmp_path: Path) -> None:
    with behaving(answer) as (url, got):
        sources = [
            f"rewards.sources.service={{kind: remote, url: '{url}/get_reward', weight: 2.0}}",
            f"rewards.sources.judge={{kind: judge, url: '{url}/v1', model: m}}",
            f"rewards.sources.period={{kind: function, of: '{PERIOD}', weight: 0.1}}",
        ]
        done = subprocess.run(command(tmp_path, *sources), capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "small"
    assert not (run / "reward_model").exists()
    assert not (run / "feedback.json").exists()
    rows = read_metrics(run)
    assert len(rows) == 8
    for row in rows:
        parts = [2.0 * row["rewards/service/mean"], row["rewards/judge/mean"], 0.1 * row["rewards/period/mean"]]
        assert row["objective/scores"] == pytest.approx(sum(parts), abs=1e-5)
        assert row["rewards/missing"] == 0
    assert sum(row.get("rewards/judge/errors", 0) + row.get("rewards/service/malformed", 0) for row in rows) > 0
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"]
    assert {body["path"] for body in got} == {"/get_reward", "/v1/chat/completions"}


def test_where_the_service_is_gone_the_run_stops_resumably_and_says_which(tmp_path: Path) -> None:
    source = "rewards.sources.service={kind: remote, url: 'http://127.0.0.1:9/get_reward', patience_s: 2}"
    done = subprocess.run(command(tmp_path, source), capture_output=True, text=True, timeout=800)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "answers have no reward (service lacks" in done.stdout + done.stderr
    assert "the same command resumes" in done.stdout + done.stderr
