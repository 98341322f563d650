"""Does a step's time grow with its tokens, and no faster? One to eight times the rollouts, one to four the lengths.

    python benchmarks/growth.py             # also draws docs/growth.svg

1.1M parameters, PPO, one epoch, the workload of `peers.py` at fixed lengths, one thing grown at a time. Medians.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from peers import IDLE_RATE, settings, steps
from plots import save
from workload import PROMPT, RESPONSE, ROLLOUTS, make_workload

from rlhf_ray.training.charts import Series, line_chart

MORE, LONGER = (1, 2, 4, 8), (1, 2, 4)
WANTED = 1.1
"""Seconds a token, over those of the smallest: linear growth, and room for noise."""


def main() -> int:
    """Prints seconds and their growth; exits 1 where a step grows faster than its tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of each size; two more warm up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), "1M", prompts=max(MORE) * ROLLOUTS)
        more = {factor: seconds(workload, options.steps, prompts=factor * ROLLOUTS) for factor in MORE}
        longer = {factor: seconds(workload, options.steps, tokens=factor * RESPONSE) for factor in LONGER if factor > 1}
    longer = {1: more[1], **longer}
    grown = {f * ROLLOUTS * (PROMPT + RESPONSE): took for f, took in more.items()}
    stretched = {ROLLOUTS * (PROMPT + f * RESPONSE): took for f, took in longer.items()}
    worst = 0.0
    for name, curve in (("rollouts", grown), ("lengths", stretched)):
        (least, first), *rest = curve.items()
        print(f"{name}: {least:,} tokens {first:.2f} s", end="")
        for tokens, took in rest:
            growth = (took / first) / (tokens / least)
            worst = max(worst, growth)
            print(f"; {tokens:,} tokens {took:.2f} s, {growth:.2f} a token of the first", end="")
        print()
    lines = [
        Series("more rollouts", [(float(tokens), took) for tokens, took in grown.items()]),
        Series("longer responses", [(float(tokens), took) for tokens, took in stretched.items()]),
    ]
    chart = line_chart(lines, label="Seconds a step", x_label="tokens a step", from_zero=True)
    print(save(chart, "growth", legend=tuple(line.label for line in lines)))
    return 0 if worst <= WANTED else 1


def seconds(workload: Path, count: int, *, prompts: int = ROLLOUTS, tokens: int = RESPONSE) -> float:
    """Median of a step with so many rollouts of so many tokens."""
    grown = (f"rollout.prompts={prompts}", f"rollout.max_tokens={tokens}")
    config = settings("ppo", 1, 0, IDLE_RATE, 0, *grown)
    return statistics.median([took for took, _ in steps(workload, config, count + 2, learns=False)][2:])


if __name__ == "__main__":
    raise SystemExit(main())
