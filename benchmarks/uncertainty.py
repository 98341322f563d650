"""Does a penalty on what an ensemble is unsure of keep PPO honest? Against a reward model of 50 pairs, on and off.

    python benchmarks/uncertainty.py --root runs            # 5 seeds, about a quarter of an hour each on two cores

Nothing confirms such a model, whose scores are otherwise held to next to nothing; here they are let as loud as a good
one's, which is what a penalty is for. Each seed has a world, a base policy and an ensemble of five of its own.
Both runs of a seed share all of that; one takes `uncertainty` times the members' variance off the reward. Gold is
compared at equal KL to the base policy: the curves of gold over KL, averaged over the KL that both runs reach, and
where the shorter of them ends. Finished runs are not made again. The differences' intervals are Student's, over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.algo.clusters import mean_of

SHARED = [
    "reward_model.limit=50",
    "reward_model.ensemble.members=5",
    "reward_model.least_std=1",
    "reward_model.confirmed_by=0",
    "reward_model.fit.max_epochs=20",
    "reward_model.fit.eval_every=5",
    "ppo.kl.coef=0.0",
    "ppo.kl.limit=1000",
    "evaluate.samples=1",
    "evaluate.best_of=1",
]
POINTS = 50
"""Of KL at which the curves are read."""


def main() -> None:
    """Prints both runs of each seed, and the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--uncertainty", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    over, at_end = [], []
    for seed in range(options.seeds):
        off = run(options, f"unsure-off-{seed}", [f"seed={seed}"])
        penalty = f"rewards.sources.reward_model={{kind: model, uncertainty: {options.uncertainty}}}"
        on = run(options, f"unsure-on-{seed}", [f"seed={seed}", f"run.from={off}", penalty])
        curves = [curve(folder, options.steps) for folder in (off, on)]
        most = min(max(kl for kl, _ in points) for points in curves)
        grid = [most * (i + 1) / POINTS for i in range(POINTS)]
        golds = [[at(points, kl) for kl in grid] for points in curves]
        over.append(statistics.fmean(golds[1]) - statistics.fmean(golds[0]))
        at_end.append(golds[1][-1] - golds[0][-1])
        told = ", ".join(
            f"{name} mean {statistics.fmean(found):.3f}, at the end {found[-1]:.3f}, best {max(found):.3f}"
            for name, found in zip(("off", "on"), golds, strict=True)
        )
        print(f"seed {seed}: gold over KL 0 to {most:.1f}: {told}", flush=True)
    for name, gaps in (("over the KL that both reach", over), ("at the end of it", at_end)):
        found = mean_of(gaps, range(len(gaps)))
        print(f"penalty on less off, gold {name}: {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")


def run(options: argparse.Namespace, run_id: str, settings: Sequence[str]) -> Path:
    """A finished run's folder."""
    folder = options.root / run_id
    if not (folder / "summary.json").exists():
        shared = [f"run.root={options.root}", f"run.id={run_id}", f"ppo.steps={options.steps}", *SHARED]
        command = [Path(sys.executable).with_name("rlhf"), "run", *shared, *settings]
        with (options.root / f"{run_id}.log").open("w") as log:
            subprocess.run(command, check=True, timeout=3600, stdout=log, stderr=subprocess.STDOUT)
    return folder


def curve(folder: Path, steps: int) -> list[tuple[float, float]]:
    """KL and gold of each step, by KL; steps of like KL are noise of each other, so three neighbours are averaged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:steps]]
    points = sorted((row["objective/kl"], row["gold/mean"]) for row in rows)
    smooth = [points[max(0, i - 1) : i + 2] for i in range(len(points))]
    return [(statistics.fmean(kl for kl, _ in some), statistics.fmean(gold for _, gold in some)) for some in smooth]


def at(points: Sequence[tuple[float, float]], kl: float) -> float:
    """Gold where the curve, straight between its points, passes a KL."""
    before = [point for point in points if point[0] <= kl]
    after = [point for point in points if point[0] > kl]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (low, one), (high, other) = before[-1], after[0]
    return one + (other - one) * (kl - low) / (high - low)


if __name__ == "__main__":
    main()
