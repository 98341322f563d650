"""Does the gain come from the feedback? Two controls, beside the run whose world, feedback and sizes they share.

- `permuted`: each batch's rewards are dealt out to the wrong rollouts. Without a KL penalty in the way, so that the
  policy moves at least as far from its reference as the real run's does.
- `shuffled`: the reward model learns from labels that say nothing, then PPO runs against it as usual.

For both the gain in gold has to be luck: the upper end of its 95% interval at most 0.05.

    python benchmarks/controls.py runs/demo

goes on from that run's base policy and feedback, and prints a table.
"""

import json
import subprocess
import sys
from pathlib import Path

CONTROLS = {
    "permuted": ["ppo.permute_rewards=true", "ppo.kl.coef=0.0"],
    "shuffled": ["reward_model.shuffle_labels=true"],
}
ALLOWED = 0.05


def main() -> int:
    """Runs what is missing, prints the table, exits 1 where a control gained."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    summaries = {source.name: read(source)}
    for name, overrides in CONTROLS.items():
        summaries[name] = run(source, f"{source.name}-{name}", overrides)
    print(f"{'run':<24}{'gold before':>12}{'after':>8}{'gain, 95%':>20}{'KL':>8}")
    for name, summary in summaries.items():
        gold = summary["gold"]
        gain = "[{:+.3f}, {:+.3f}]".format(*gold["gain_ci95"])
        print(f"{name:<24}{gold['before']:>12.3f}{gold['after']:>8.3f}{gain:>20}{summary['kl']:>8.2f}")
    gained = [name for name in CONTROLS if summaries[name]["gold"]["gain_ci95"][1] > ALLOWED]
    print(f"controls that gained: {', '.join(gained) or 'none'}")
    return 1 if gained else 0


def run(source: Path, run_id: str, overrides: list[str]) -> dict:
    """One control, from the same base policy and feedback as `source`."""
    # A control that trains its own reward model must not take over the other one.
    keep = ["run.take=feedback"] if "reward_model.shuffle_labels=true" in overrides else []
    rlhf = Path(sys.executable).with_name("rlhf")
    settings = [f"run.id={run_id}", f"run.root={source.parent}", f"run.from={source}", *keep, *overrides]
    subprocess.run([rlhf, "run", "-c", source / "config.yaml", *settings], check=True, timeout=3600)
    return read(source.parent / run_id)


def read(folder: Path) -> dict:
    """A finished run's summary."""
    return json.loads((folder / "summary.json").read_text())


if __name__ == "__main__":
    raise SystemExit(main())
