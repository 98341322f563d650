"""What does a step cost where the next one is sampled meanwhile, beside the longer of its two halves alone?

    python benchmarks/pipeline.py                      # 1.1M and 12M parameters
    python benchmarks/pipeline.py --sizes 1M --rounds 4

One generator and one learner with one thread each, on two cores. In each round some steps one after the other, which
give the seconds of generating and of scoring, preparing and learning, each alone; then as many with the next step
sampled ahead. The bound is the longer of the two. 64 prompts of some 16 tokens, up to 64 sampled, one epoch.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

from rlhf_ray.config import Config, load_config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.models.policy import new_policy, save_policy, train_tokenizer
from rlhf_ray.rewards.combined import CombinedRewards, Weighted
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import start_ray
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.ppo import PPO, Roles
from rlhf_ray.types import Exchange, Message, Prompt

SIZES = {"1M": (128, 4, 384, 4), "10M": (384, 6, 1152, 6)}
"""Width, depth, feed-forward width and heads."""
HALF = ("score", "prepare", "learn")
WANTED = 1.25
STEPS = 4
"""Of each kind in a round; the first one ahead is not counted, for nothing was sampled before it."""


class LengthScorer:
    """A reward that costs nothing."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """By characters."""
        return [len(exchange.response) / 100 for exchange in exchanges]


def main() -> int:
    """Prints ratios; exits 1 where one is over what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    passed = [measure(size, options.rounds) for size in options.sizes]
    return 0 if all(passed) else 1


def settings(size: str) -> list[str]:
    """Those of one size, one after the other."""
    hidden, layers, intermediate, heads = SIZES[size]
    return [
        "run.id=bench", f"model.hidden={hidden}", f"model.layers={layers}", f"model.intermediate={intermediate}",
        f"model.heads={heads}", "model.vocabulary=1024", "rollout.prompts=64", "rollout.max_tokens=64",
        "ppo.epochs=1", "ppo.minibatch=16", "ppo.steps=1000000", "ppo.learning_rate=1e-6", "ppo.kl.limit=1e9",
        "resources.threads=1",
    ]  # fmt: skip


def measure(size: str, rounds: int) -> bool:
    """One size's line."""
    after, ahead = (load_config(None, [*settings(size), f"rollout.max_staleness={n}"]) for n in (0, 1))
    draw = Random(0)
    texts = [" ".join("".join(draw.choices("aeioubdgklmnrst", k=4)) for _ in range(6)) for _ in range(400)]
    prompts = [Prompt(f"p{i}", (Message("user", text),), group=f"p{i}") for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder, start_ray(after) as placement:
        tokenizer = train_tokenizer(texts, vocabulary=after.model.vocabulary, context=after.model.context)
        base = Path(folder) / "policy"
        policy = new_policy(after.model, tokenizer, seed=0)
        save_policy(base, policy, tokenizer)
        generators = placement.start_generators(base, weights_step=0)
        learner = placement.start_learner(partial(Learner.from_folder, base, after))
        scorers = placement.start_scorers(
            base, load=lambda: CombinedRewards({"length": Weighted(ModelSource([LengthScorer()]))})
        )
        placement.wait_ready()
        handoff = WeightsHandoff(learner, generators, vocabulary=len(tokenizer), context=after.model.context)
        roles, stream = Roles(generators, scorers, learner, handoff), PromptStream(prompts, seed=0)
        generate, learn, together, step = [], [], [], 0

        def steps(config: Config) -> list[tuple[float, dict[str, float]]]:
            nonlocal step
            taken, ppo = [], PPO(roles, prompts=stream, tokenizer=tokenizer, config=config)
            for _ in range(STEPS):
                start = time.monotonic()
                metrics = ppo.step(step).metrics
                taken.append((time.monotonic() - start, metrics))
                step += 1
            ppo.close()
            return taken

        for turn in range(rounds + 1):
            alone, overlapped = steps(after), steps(ahead)[1:]
            if turn:
                generate += [metrics["time/rollout_s"] for _, metrics in alone]
                learn += [
                    sum(metrics[f"time/{what}_s"] for what in ("score", "prepare", "learn")) for _, metrics in alone
                ]
                together += [seconds for seconds, _ in overlapped]
    halves = statistics.median(generate), statistics.median(learn)
    ratio = statistics.median(together) / max(halves)
    parameters = sum(p.numel() for p in policy.parameters()) / 1e6
    print(
        f"{size} ({parameters:.1f}M parameters): generate {halves[0]:.2f} s, score to learn {halves[1]:.2f} s, "
        f"each alone; overlapped {statistics.median(together):.2f} s, {ratio:.2f} of the longer (wanted: {WANTED})",
        flush=True,
    )
    return ratio <= WANTED


if __name__ == "__main__":
    raise SystemExit(main())
