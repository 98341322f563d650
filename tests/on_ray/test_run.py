"""The command that people run, small and whole: it learns, leaves what it promises, and survives kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.training.lineage import lineage_of
from rlhf_ray.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SMALL = """
run: {root: RUNS, id: small}
data: {prompts: 440, held_out: 40}
model: {hidden: 64, layers: 2, heads: 2, intermediate: 160}
pretrain: {max_epochs: 2}
sft: {max_epochs: 6}
feedback: {prompts: 150}
reward_model: {fit: {max_epochs: 2}}
rollout: {prompts: 32}
ppo: {steps: 8, minibatch: 16, learning_rate: 5e-4, missing_end_penalty: 0.0}
checkpoint: {every: 2}
evaluate: {samples: 4, best_of: 4}
"""


def command(folder: Path, *overrides: str) -> list[str]:
    (folder / "small.yaml").write_text(SMALL.replace("RUNS", str(folder / "runs")))
    return [sys.executable, "-m", "rlhf_ray.cli", "run", "-c", str(folder / "small.yaml"), *overrides]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run killed within its base policy and after PPO's first checkpoint, and finished by the same command: its
    folder, and the logs of all but the first.
    """
    folder = tmp_path_factory.mktemp("run")
    run = folder / "runs" / "small"
    kill_once_there(folder, run, "fits/pretrain/checkpoint-*/fit.json")
    again = kill_once_there(folder, run, "checkpoints/step_????????")
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, again + done.stdout


def kill_once_there(folder: Path, run: Path, pattern: str) -> str:
    """Runs the command and kills it as soon as its run folder holds such a file; what it printed."""
    log = folder / "killed.log"
    with log.open("w") as out:
        process = subprocess.Popen(command(folder), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(run.glob(pattern)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    return log.read_text()


def test_a_killed_run_resumes_by_the_same_command_and_says_where(killed_and_resumed: tuple[Path, str]) -> None:
    run, log = killed_and_resumed
    assert "pretrain goes on from its checkpoint at step" in log
    assert "resuming run small at step" in log
    assert log.count("== base policy") == 1  # when it went on with that; PPO's resume did not need it again
    assert not list(run.glob("fits/*"))
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 9))


def test_ppo_raises_the_held_out_reward(killed_and_resumed: tuple[Path, str]) -> None:
    summary = json.loads((killed_and_resumed[0] / "summary.json").read_text())
    assert summary["reward"]["after"] > summary["reward"]["before"] + 0.3 * summary["reward"]["sd_before"]
    assert summary["kl"] < summary["kl_limit"]


def test_the_engine_and_the_learner_agree_on_every_step(killed_and_resumed: tuple[Path, str]) -> None:
    for row in read_metrics(killed_and_resumed[0]):
        assert row["mismatch/max_abs"] < 1e-4
        assert row["sync/verified"] == 1
        assert row["rollout/staleness_max"] == 0


def test_the_folder_holds_what_the_readme_promises(killed_and_resumed: tuple[Path, str]) -> None:
    run = killed_and_resumed[0]
    AutoModelForCausalLM.from_pretrained(run / "policy")
    assert AutoModelForSequenceClassification.from_pretrained(run / "reward_model").config.num_labels == 1
    assert "<svg" in (run / "report.html").read_text()
    assert list((run / "tensorboard").iterdir())
    assert len(json.loads((run / "samples.json").read_text())) == 10


def test_a_finished_run_says_so_and_does_nothing(killed_and_resumed: tuple[Path, str], tmp_path: Path) -> None:
    run = killed_and_resumed[0]
    before = (run / "summary.json").stat().st_mtime_ns
    done = subprocess.run(command(run.parent.parent), capture_output=True, text=True, timeout=200)
    assert (done.returncode, "is done" in done.stdout) == (0, True), done.stdout + done.stderr
    assert (run / "summary.json").stat().st_mtime_ns == before


def test_a_profile_says_who_worked_when_and_leaves_the_run_as_it_was(killed_and_resumed: tuple[Path, str]) -> None:
    run = killed_and_resumed[0]
    kept = [run / "metrics.jsonl", run / "summary.json", run / "config.yaml", *run.glob("checkpoints/*/*")]
    before = [path.stat().st_mtime_ns for path in kept]
    words = [sys.executable, "-m", "rlhf_ray.cli", "profile", str(run), "rollout.max_staleness=1", "--steps", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting generator-0, learner, scorer-0: threads: 1 for generator, 1 for scorer" in done.stdout
    assert "ready after" in done.stdout
    shares = json.loads((run / "profile.json").read_text())["shares"]
    assert shares["generator-0"]["generate"] > 0.05
    assert shares["learner"]["learn"] > 0.05
    assert shares["learner"]["hand over"] > 0
    assert all(sum(parts.values()) == pytest.approx(1.0) for parts in shares.values())
    assert "Who worked when" in (run / "report.html").read_text()
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_asked_to_stop_it_saves_and_exits_143(killed_and_resumed: tuple[Path, str]) -> None:
    run = killed_and_resumed[0]
    overrides = ["run.id=stopped", f"run.from={run}", "ppo.steps=100"]
    process = subprocess.Popen(
        command(run.parent.parent, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ppo "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=200) == 143, rest
    assert "SIGTERM received" not in rest  # Ray's own handler, which aborts after three seconds
    assert "the same command resumes" in rest
    assert list((run.parent / "stopped" / "checkpoints").glob("step_????????"))


TIMES = ("time/", "sync/seconds", "rollout/tokens_per_s")


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_in_the_same_bits_as_one_that_was_not(
    killed_and_resumed: tuple[Path, str], tmp_path: Path
) -> None:
    broken, whole = killed_and_resumed[0], tmp_path / "runs" / "small"
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    for model in ("base_policy", "reward_model", "policy"):
        files = [run / model / "model.safetensors" for run in (broken, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), model
    figures = [
        [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in read_metrics(run)]
        for run in (broken, whole)
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.advantage=remax"],
        ["ppo.advantage=grpo", "rollout.prompts=8", "rollout.dynamic_sampling=2", "ppo.loss=gspo"],
        ["lora.rank=8", "ppo.learning_rate=2e-3"],
        ["ppo.ptx_coef=0.1", "ppo.critic_from=reward_model", "ppo.critic_warmup=1", "ppo.correction=token"],
        ["resources.learner_ranks=2", "resources.threads=1", "resources.learner_tokens=500"],
        ["ppo.ema=0.5", "ppo.schedule=cosine", "ppo.warmup=1", "resources.recompute=true"],
        ["method=dpo"],
        ["method=kto"],
        ["reward_model.backbone=encoder", "reward_model.judge=true", "run.take=feedback", "evaluate.every=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_algorithms_run_whole_and_the_engine_agrees(
    killed_and_resumed: tuple[Path, str], overrides: list[str], request: pytest.FixtureRequest
) -> None:
    run = killed_and_resumed[0]
    name = request.node.callspec.id.replace("=", "-").replace(".", "-").lower()
    settings = [f"run.id={name}", f"run.from={run}", "ppo.steps=3", *overrides]
    done = subprocess.run(command(run.parent.parent, *settings), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run.parent / name / "summary.json").read_text())
    assert summary["gold"]["after"] > 0
    assert summary["kl"] < summary["kl_limit"]
    if "evaluate.every=1" in overrides:
        rows = read_metrics(run.parent / name)
        assert all("held_out/judge" in row for row in rows)
        best = json.loads((run.parent / name / "best.json").read_text())
        assert (best["step"], best["by"]) == (summary["best_step"], "the judge")
        assert lineage_of(run.parent / name)["step"] == best["step"]
    if summary["method"] == "rl":
        assert len(read_metrics(run.parent / name)) == 3
        assert summary["mismatch_max_abs"] < 1e-4
    AutoModelForCausalLM.from_pretrained(run.parent / name / "policy")


@pytest.mark.slow
def test_a_policy_is_set_beside_another_and_the_same_command_says_the_same(
    killed_and_resumed: tuple[Path, str], tmp_path: Path
) -> None:
    ask = [sys.executable, "-m", "rlhf_ray.cli", "eval", str(killed_and_resumed[0]), "--against-base", "--samples", "2"]
    asks = [[*ask, "--sheet", str(tmp_path / f"{name}.csv")] for name in ("first", "second")]
    first, second = (subprocess.run(ask, capture_output=True, text=True, timeout=300, check=True) for ask in asks)
    assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()
    assert (tmp_path / "first.csv").read_text(encoding="utf-8").count("user: ") > 20
    found = json.loads(first.stdout)
    assert first.stdout == second.stdout
    assert found["win_rate"]["by"] == "gold"
    assert found["win_rate"]["rate"] > 0.5
