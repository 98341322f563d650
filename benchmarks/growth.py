"""Does a step's time grow with its tokens, and no faster? One to eight times the rollouts, one to four the lengths.

    python benchmarks/growth.py             # also draws docs/growth.svg

1.1M parameters, PPO, one epoch, the workload of `peers.py` at fixed lengths, one thing grown at a time. Medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from peers import IDLE_RATE, roles_for, settings
from plots import save
from workload import PROMPT, RESPONSE, ROLLOUTS, make_workload

from rlhf_ray.config import Config
from rlhf_ray.training.charts import Series, line_chart
from rlhf_ray.training.ppo import PPO

MORE, LONGER = (1, 2, 4, 8), (1, 2, 4)
WANTED = 1.1
"""Seconds a token, over those of the smallest: linear growth, and room for noise."""


def main() -> int:
    """Prints seconds and their growth; exits 1 where a step grows faster than its tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="of each size; one more warms up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(Path(folder), "1M", prompts=max(MORE) * ROLLOUTS)
        with roles_for(workload, sized(ROLLOUTS, RESPONSE)) as make:
            seconds = Seconds(make, options.steps)
            more = {factor: seconds.of(factor * ROLLOUTS, RESPONSE) for factor in MORE}
            longer = {factor: seconds.of(ROLLOUTS, factor * RESPONSE) for factor in LONGER if factor > 1}
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


class Seconds:
    """Steps of several sizes by the same roles, one after the other."""

    def __init__(self, make: Callable[[Config], PPO], count: int) -> None:
        self.make, self.count, self.step = make, count, 0

    def of(self, prompts: int, tokens: int) -> float:
        """Median of a step with so many rollouts of so many tokens; the first one only warms up."""
        took = []
        with closing(self.make(sized(prompts, tokens))) as ppo:
            for _ in range(self.count + 1):
                start = time.perf_counter()
                ppo.step(self.step)
                took.append(time.perf_counter() - start)
                self.step += 1
        return statistics.median(took[1:])


def sized(prompts: int, tokens: int) -> Config:
    """The workload's config, grown."""
    return settings("ppo", 1, 0, IDLE_RATE, 0, f"rollout.prompts={prompts}", f"rollout.max_tokens={tokens}")


if __name__ == "__main__":
    raise SystemExit(main())
