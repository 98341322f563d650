"""What does each algorithm gain from the same feedback and the same number of samples?

    python benchmarks/algorithms.py runs/demo-0 runs/demo-14 runs/demo-15

Each goes on from those runs' base policy, feedback and reward model (`gae`, the default, is those runs themselves);
finished ones are read, a broken one is resumed.
Prints a row an algorithm: gold on held-out prompts after training, by seed and in the mean, with the interval of the
smallest gain. `--only grpo rloo` makes some of them. About two minutes an algorithm and seed on 2 cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config, load_config

RLHF = Path(sys.executable).with_name("rlhf")
ALGORITHMS = {
    "gae": [],
    "reinforce": ["ppo.advantage=reinforce"],
    "reinforce_to_go": ["ppo.advantage=reinforce", "ppo.credit=to_go"],
    "reinforce_pp": ["ppo.advantage=reinforce_pp"],
    "reinforce_pp_baseline": ["ppo.advantage=reinforce_pp_baseline"],
    "rloo": ["ppo.advantage=rloo"],
    "grpo": ["ppo.advantage=grpo"],
    "dr_grpo": ["ppo.advantage=dr_grpo"],
    "remax": ["ppo.advantage=remax"],
    "gae, dual_clip": ["ppo.loss=dual_clip"],
    "grpo, gspo": ["ppo.advantage=grpo", "ppo.loss=gspo"],
    "grpo, cispo": ["ppo.advantage=grpo", "ppo.loss=cispo"],
    "dpo": ["method=dpo"],
    "ipo": ["method=ipo"],
    "kto": ["method=kto"],
}
WANTED = {"gae": 0.2, "rloo": 0.2, "grpo": 0.2, "reinforce_pp": 0.2}
"""Least gain in gold, in the mean over the seeds."""


def main() -> int:
    """Runs what is missing, prints the table, exits 1 where a gain is below what is wanted."""
    parser = argparse.ArgumentParser(description="Gold after training, algorithm by algorithm.")
    parser.add_argument("sources", nargs="+", type=Path, help="finished demo runs, one a seed")
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--rlhf", nargs="+", default=[str(RLHF)], help="the command, where it is not beside Python")
    options = parser.parse_args()
    print(
        "| algorithm | gold after, by seed | mean | gain | least gain, 95% | KL | distinct-2 kept | minutes |",
        flush=True,
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    first = [read(source) for source in options.sources]
    best = [summary["gold"]["best_of_n"]["gold"] for summary in first]
    n = first[0]["gold"]["best_of_n"]["n"]
    print(f"| best of {n} before, by gold | {numbers(best)} | {mean(best):.3f} | | | | | |", flush=True)
    short = []
    for name in options.only:
        runs = [run(options.rlhf, source, name) for source in options.sources]
        print(row(name, runs), flush=True)
        if mean([gain(summary) for summary in runs]) < WANTED.get(name, 0.0):
            short.append(name)
    print(f"below what is wanted: {', '.join(short) or 'none'}")
    return 1 if short else 0


def run(rlhf: list[str], source: Path, name: str) -> dict:
    """One algorithm from the base policy, feedback and reward model of one run, which went by the default."""
    if not ALGORITHMS[name]:
        return read(source)
    folder = source.parent / f"{source.name}-{name.replace(', ', '-')}"
    seed = read(source)["seed"]
    settings = [f"run.id={folder.name}", f"run.root={source.parent}", f"run.from={source}", f"seed={seed}"]
    settings += ALGORITHMS[name]
    if not (folder / "summary.json").exists():
        with folder.with_suffix(".log").open("a") as log:
            subprocess.run([*rlhf, "run", *settings], check=True, timeout=3600, stdout=log, stderr=log)
    if chosen(load_config(folder / "config.yaml")) != chosen(load_config(None, settings)):
        raise SystemExit(f"{folder} was made with other settings than {name} has today: remove it to make it again")
    return read(folder)


def chosen(config: Config) -> dict[str, Any]:
    """What decides a run's figures."""
    unused = "direct" if config.method == "rl" else "ppo"
    return config.model_dump(exclude={"run", "resources", "checkpoint", unused})


def row(name: str, runs: list[dict]) -> str:
    """A row of the table."""
    gold = [summary["gold"]["after"] for summary in runs]
    lows, highs = zip(*(summary["gold"]["gain_ci95"] for summary in runs), strict=True)
    least = min(range(len(runs)), key=lambda i: lows[i])
    kept = mean([summary["distinct_2"]["after"] / summary["distinct_2"]["before"] for summary in runs])
    minutes = mean([sum(s for stage, s in r["seconds_by_stage"].items() if stage in COUNTED) / 60 for r in runs])
    return (
        f"| {name} | {numbers(gold)} | {mean(gold):.3f} | {mean([gain(summary) for summary in runs]):+.3f} "
        f"| [{lows[least]:+.3f}, {highs[least]:+.3f}] | {mean([summary['kl'] for summary in runs]):.1f} "
        f"| {kept:.2f} | {minutes:.1f} |"
    )


COUNTED = {"ppo", "evaluation", "dpo", "ipo", "kto"}
"""Stages that are the algorithm's own."""


def gain(summary: dict) -> float:
    """In gold, on held-out prompts."""
    return summary["gold"]["after"] - summary["gold"]["before"]


def mean(values: list[float]) -> float:
    """Of a few numbers."""
    return statistics.fmean(values)


def numbers(values: list[float]) -> str:
    """One a seed."""
    return ", ".join(f"{value:.3f}" for value in values)


def read(folder: Path) -> dict:
    """A finished run's summary."""
    return json.loads((folder / "summary.json").read_text())


if __name__ == "__main__":
    raise SystemExit(main())
