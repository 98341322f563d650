"""Makes the figures of docs/results.md again: three seeds of the demo, two controls, every algorithm on those seeds,
the learner beside a bare loop, and given data, people's choices.

    python benchmarks/results.py [harmless-base.jsonl.gz]

Finished runs in `runs/` are read, missing ones are made; prints a table. About three hours on 2 cores, most of them
the algorithms'; broken off, it goes on where it was.
"""

import json
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs")
RLHF = Path(sys.executable).with_name("rlhf")
HERE = Path(__file__).parent
SEEDS = (0, 14, 15)


def main() -> None:
    """Runs what is missing and prints every figure."""
    for seed in SEEDS:
        finish(f"demo-{seed}", ["demo", f"run.id=demo-{seed}", f"seed={seed}"])
    show([f"demo-{seed}" for seed in SEEDS])
    subprocess.run([sys.executable, HERE / "controls.py", RUNS / "demo-0"], check=False, timeout=7200)
    sources = [RUNS / f"demo-{seed}" for seed in SEEDS]
    subprocess.run([sys.executable, HERE / "algorithms.py", *sources], check=False, timeout=6 * 3600)
    for more in ([], ["--memory"]):
        subprocess.run([sys.executable, HERE / "learner.py", sources[0], *more], check=False, timeout=3600)
    if len(sys.argv) > 1:
        finish("hh", ["run", "-c", HERE.parent / "deployments/jobs/hh.yaml", f"data.path={sys.argv[1]}", "run.id=hh"])
        show(["hh"])


def finish(run_id: str, arguments: list[str | Path]) -> None:
    """Runs or resumes until the run has its summary."""
    if not (RUNS / run_id / "summary.json").exists():
        subprocess.run([RLHF, *arguments], check=True, timeout=7200)


def show(run_ids: list[str]) -> None:
    """One line a run."""
    print(
        "| run | gold before | after | gain, 95% | best of n | reward, in sd | RM accuracy | KL / limit | distinct-2 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for run_id in run_ids:
        print(line(run_id, json.loads((RUNS / run_id / "summary.json").read_text())))


def line(run_id: str, summary: dict) -> str:
    """A row of the table."""
    gold, reward, distinct = summary["gold"], summary["reward"], summary["distinct_2"]
    gain = (reward["after"] - reward["before"]) / reward["sd_before"]
    low, high = summary["reward_model"]["accuracy_ci95"]
    cells = [run_id]
    if gold:
        interval = "[{:+.3f}, {:+.3f}]".format(*gold["gain_ci95"])
        best = f"{gold['best_of_n']['gold']:.3f} ({gold['best_of_n']['n']})"
        cells += [f"{gold['before']:.3f}", f"{gold['after']:.3f}", interval, best]
    else:
        cells += ["-"] * 4
    cells += [
        f"{gain:+.2f}",
        f"{summary['reward_model']['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
        f"{summary['kl']:.1f} / {summary['kl_limit']:g}",
        f"{distinct['before']:.3f} to {distinct['after']:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
