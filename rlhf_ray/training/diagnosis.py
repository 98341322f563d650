"""Why is my reward flat? The likeliest causes, read from a run's metrics, with what to do about each.

Each rule looks at the steps so far and names a cause only where its own figure shows it. They stand in the order in
which one would have to rule them out: what makes the others' figures mean nothing comes first.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.training.verdict import figure

LEAST_STEPS = 4
"""Fewer steps say nothing about a trend."""
GAIN_WANTED = 0.5
"""Standard deviations of the first steps' scores by which the score has to rise not to count as flat."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause, the figure that shows it, and the way out."""

    cause: str
    evidence: str
    remedy: str


class Steps:
    """A run's metrics, asked for by name."""

    def __init__(self, rows: Rows, config: Mapping[str, Any]) -> None:
        self.rows, self.config = rows, config

    def of(self, name: str) -> list[float]:
        """A metric's finite values, step by step."""
        return [value for row in self.rows if (value := figure(row, name)) is not None]

    def late(self, name: str) -> float | None:
        """Its median over the later half."""
        values = self.of(name)
        return statistics.median(values[len(values) // 2 :]) if values else None

    def early(self, name: str) -> float | None:
        """Its median over the first quarter."""
        values = self.of(name)
        return statistics.median(values[: max(1, len(values) // 4)]) if values else None

    def setting(self, *path: str) -> float | None:
        """A number of the run's config."""
        return figure(self.config, *path)


Rule = Callable[[Steps], Finding | None]


def diagnose(rows: Rows, config: Mapping[str, Any]) -> list[Finding]:
    """The causes that the figures show, the one to rule out first at the head; none where the reward is not flat."""
    steps = Steps(rows, config)
    if not is_flat(steps):
        return []
    found = [finding for rule in RULES if (finding := rule(steps))]
    return found or [NOTHING_SHOWS]


def is_flat(steps: Steps) -> bool:
    """Whether the reward model's score of the rollouts has hardly risen; not while there are too few steps to say."""
    scores = steps.of("objective/scores")
    if len(scores) < LEAST_STEPS:
        return False
    third = max(1, len(scores) // 3)
    gain = statistics.fmean(scores[-third:]) - statistics.fmean(scores[:third])
    return gain < GAIN_WANTED * (steps.early("objective/scores_std") or 0.0) or gain <= 0


def mismatch(steps: Steps) -> Finding | None:
    """The engine samples from another distribution than the learner thinks."""
    gaps, tolerance = steps.of("mismatch/max_abs"), steps.setting("rollout", "tolerance") or 1e-4
    if not gaps or max(gaps) <= 10 * tolerance:
        return None
    return Finding(
        "engine and learner disagree",
        f"their log-probs differ by up to {max(gaps):.1e} nats a token, where {tolerance:.0e} is allowed for",
        "hold rollout.temperature and top_p against what the engine does, or set ppo.correction=token",
    )


def saturated(steps: Steps) -> Finding | None:
    """The reward model tells the answers hardly apart."""
    spread, first = steps.late("objective/scores_std"), steps.early("objective/scores_std")
    if spread is None or first is None or spread > max(0.02, 0.2 * first):
        return None
    return Finding(
        "the reward model is saturated",
        f"its scores of a step's answers vary by {spread:.2g} only (at first by {first:.2g})",
        "train it on answers like these, with more feedback that tells them apart; or set ppo.reward_norm=batch",
    )


def equal_groups(steps: Steps) -> Finding | None:
    """Most prompts' answers all earn the same, so that nothing is better than the rest."""
    share = steps.late("objective/equal_groups")
    if share is None or share < 0.5:
        return None
    return Finding(
        "equal groups",
        f"to {share:.0%} of the prompts all answers earn the same, and teach nothing",
        "set rollout.dynamic_sampling=3, raise rollout.samples or rollout.temperature, or give harder prompts",
    )


def dead_entropy(steps: Steps) -> Finding | None:
    """The policy says the same thing whatever it draws."""
    entropy, first = steps.late("objective/entropy"), steps.early("objective/entropy")
    if entropy is None or first is None or entropy > 0.02:
        return None
    return Finding(
        "dead entropy",
        f"a token's entropy is {entropy:.3f} nats: sampling explores nothing",
        "start from an earlier checkpoint or the base policy with a lower ppo.learning_rate, ppo.entropy_coef=0.01 or "
        "ppo.clip_high=0.28",
    )


def clipped(steps: Steps) -> Finding | None:
    """The policy moves so far in an update that most of the gradient is cut off."""
    share = steps.late("policy/clipfrac_avg")
    if share is None or share < 0.3:
        return None
    return Finding(
        "updates are too large",
        f"the clip cuts off {share:.0%} of the tokens' gradients",
        "lower ppo.learning_rate or ppo.epochs, or raise ppo.minibatch",
    )


def skipped(steps: Steps) -> Finding | None:
    """Gradients that are not finite are not followed."""
    count = sum(steps.of("learn/skipped_updates"))
    if not count:
        return None
    return Finding(
        "gradients that are not finite",
        f"{count:.0f} updates were left out",
        "lower ppo.learning_rate, and look for extreme rewards",
    )


def held_back(steps: Steps) -> Finding | None:
    """Leaving the reference costs more than any answer can earn."""
    coef, kl = steps.late("objective/kl_coef"), steps.late("objective/kl")
    spread = steps.late("objective/scores_std")
    if coef is None or kl is None or coef < max(1.0, spread or 0.0):
        return None
    return Finding(
        "held back by the KL penalty",
        f"a nat away from the reference costs {coef:.2g}, more than the answers' rewards vary, and the KL is {kl:.2f}",
        "lower ppo.kl.coef, or set ppo.kl.target to the nats that you allow",
    )


def far_away(steps: Steps) -> Finding | None:
    """The policy has used up the distance it may go and earned nothing on the way."""
    kl, limit = steps.late("objective/kl"), steps.setting("ppo", "kl", "limit")
    if kl is None or limit is None or kl < 0.5 * limit:
        return None
    return Finding(
        "near the KL limit",
        f"{kl:.1f} of {limit:g} nats a response are used up, and the score has not risen",
        "the reward may be noise: look at the reward model's accuracy; raise ppo.kl.coef or lower ppo.learning_rate",
    )


def slow(steps: Steps) -> Finding | None:
    """The policy hardly moves."""
    moved, rate = steps.late("policy/approxkl_avg"), steps.late("lr")
    if moved is None or moved > 1e-5:
        return None
    return Finding(
        "the learning rate is too small",
        f"an update moves the policy by {moved:.1e} nats a token (1e-3 is usual) at a learning rate of {rate or 0:.0e}",
        "raise ppo.learning_rate by tens until policy/approxkl_avg is between 1e-4 and 1e-2",
    )


RULES: tuple[Rule, ...] = (
    mismatch,
    skipped,
    saturated,
    equal_groups,
    dead_entropy,
    clipped,
    held_back,
    far_away,
    slow,
)
NOTHING_SHOWS = Finding(
    "nothing in the figures",
    "the policy moves, its samples vary, and the engine agrees with the learner",
    "give it more steps; else the reward model may prefer nothing that the policy can reach: look at its accuracy and "
    "at the answers it likes best",
)
