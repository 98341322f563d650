"""Does the overlapped loop learn as well as the one whose roles take turns, and in how much of its time?

    python benchmarks/overlap.py runs/demo             # five pairs of runs from its base policy and reward model

The two of a pair have one name, from which all draws follow. They differ in `rollout.max_staleness` (1 and 0), and with
it in what comes along: half the cores for each role, and truncated importance sampling. Gold is on held-out prompts at
the end; the mean of the differences may be at most 0.05 below 0, by its one-sided 95% bound (Student's t). Time is the
loop's own, step by step, without what is measured on held-out prompts.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

MARGIN, WANTED_TIME = 0.05, 0.75
T95 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 8: 1.895, 10: 1.833}
"""One-sided 95% points of Student's t, by number of pairs."""


def main() -> int:
    """Makes the runs that are missing; exits 1 where the overlapped ones are worse or not quicker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run with a reward model")
    parser.add_argument("--pairs", type=int, choices=T95, default=5)
    parser.add_argument("settings", nargs="*", help="for all runs: dotted.key=value")
    options = parser.parse_args()
    print("| seed | gold, in turn | overlapped | KL | | s a step | |")
    print("|---|---|---|---|---|---|---|")
    differences, times = [], []
    for seed in range(options.pairs):
        turns, overlapped = (finish(options.source, seed, staleness, options.settings) for staleness in (0, 1))
        differences.append(overlapped["gold"] - turns["gold"])
        times.append(overlapped["seconds"] / turns["seconds"])
        cells = [f"{run[key]:.3f}" for key in ("gold", "kl", "seconds") for run in (turns, overlapped)]
        print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)
    bound = statistics.fmean(differences) - T95[options.pairs] * statistics.stdev(differences) / options.pairs**0.5
    share = statistics.median(times)
    print(
        f"gold: {statistics.fmean(differences):+.3f} overlapped, at least {bound:+.3f} (allowed: {-MARGIN:+.2f}); "
        f"time: {share:.2f} of the other (wanted: {WANTED_TIME})"
    )
    return 0 if bound >= -MARGIN and share <= WANTED_TIME else 1


def finish(source: Path, seed: int, staleness: int, settings: list[str]) -> dict[str, float]:
    """A run's figures; made where it is not there yet."""
    run = source.parent / f"overlap-{staleness}" / f"pair-{seed}"  # the same name for both
    if not (run / "summary.json").exists():
        rlhf = Path(sys.executable).with_name("rlhf")
        overrides = [
            f"run.id={run.name}", f"run.root={run.parent}", f"run.from={source}",
            f"rollout.max_staleness={staleness}", *settings,
        ]  # fmt: skip
        command = [rlhf, "ppo", "-c", source / "config.yaml", *overrides]
        subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL)
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.fmean(row["time/step_s"] for row in rows)
    return {"gold": summary["gold"]["after"], "kl": summary["kl"], "seconds": seconds}


if __name__ == "__main__":
    raise SystemExit(main())
