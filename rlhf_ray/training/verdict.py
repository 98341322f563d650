"""What a run's `summary.json` says, in words: did it learn, and may one believe it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISMATCH_LIMIT = 1e-4
"""Nats a token between the engine's and the learner's log-probs; more than float error means other weights."""
LEAST_DISTINCT_KEPT = 0.5
"""Share of the base's distinct bigrams that the answers should keep."""
MOST_TOP_ANSWER = 0.05
"""Share of the samples that one single answer may take."""

LEARNED = "Did it learn?"


@dataclass(frozen=True)
class Check:
    """One question put to a run, answered yes, no or (None) not known."""

    question: str
    passed: bool | None
    text: str


def figure(tree: Any, *keys: str | int) -> float | None:
    """The finite number at a path of keys in decoded JSON; None where there is no such thing."""
    for key in keys:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(tree, bool) or not isinstance(tree, (int, float)) or not math.isfinite(tree):
        return None
    return tree


def learned(summary: Mapping[str, Any]) -> Check:
    """Whether the policy got better on held-out prompts: by gold where there is one, else by the reward model."""
    before, after = figure(summary, "gold", "before"), figure(summary, "gold", "after")
    if before is not None and after is not None:
        low, high = figure(summary, "gold", "gain_ci95", 0), figure(summary, "gold", "gain_ci95", 1)
        return _learned_by_gold(before, after, low, high)
    before, after = figure(summary, "reward", "before"), figure(summary, "reward", "after")
    spread = figure(summary, "reward", "sd_before")
    if before is None or after is None or not spread:
        return Check(LEARNED, None, "No held-out score before and after training.")
    gain = (after - before) / spread
    moved = "rose" if gain >= 0 else "fell"
    said = (
        f"The reward model's score of held-out answers {moved} by {abs(gain):.2f} standard deviations of the "
        f"starting policy's, from {before:.2f} to {after:.2f}."
    )
    said += " There is no gold score, so this is the reward model's own opinion."
    if stays_varied(summary).passed is False:
        return Check(LEARNED, False, f"It found a trick: the answers have collapsed. {said}")
    opening = "The reward rose." if gain >= 1 else "The policy hardly changed." if gain > -1 else "It got worse."
    return Check(LEARNED, gain >= 1, f"{opening} {said}")


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a finished run says of itself at the end of its log: each question, answered in words."""
    checks = [learned(summary), within_kl(summary), engine_agrees(summary), stays_varied(summary)]
    checks += [check] if (check := not_exploited(summary)) else []
    answers = {True: "yes", False: "NO", None: "not known"}
    lines = [f"{check.question} {answers[check.passed]}. {check.text}" for check in checks]
    best, n = figure(summary, "gold", "best_of_n", "gold"), figure(summary, "gold", "best_of_n", "n")
    if best is not None and n is not None:
        lines.insert(1, f"Within reach? The best of {n:.0f} answers before, picked by gold: {best:.2f}.")
    return lines


def not_exploited(summary: Mapping[str, Any]) -> Check | None:
    """Whether a judge that PPO never saw stayed with the reward model; None where nobody looked."""
    best, alarm = figure(summary, "best_step"), figure(summary, "alarm_step")
    if best is None:
        return None
    question = "Reward model not exploited?"
    if alarm is None:
        return Check(question, True, f"No look at held-out prompts raised the alarm; step {best:g} did best.")
    said = f"At step {alarm:g} the judge's scores had fallen while the reward model's rose; step {best:g} did best."
    return Check(question, False, said)


def _learned_by_gold(before: float, after: float, low: float | None, high: float | None) -> Check:
    moved = "rose" if after >= before else "fell"
    rise = f"Gold {moved} from {before:.2f} to {after:.2f} on held-out prompts ({after - before:+.2f}"
    if low is None or high is None:
        return Check(LEARNED, None, f"{rise}). Without an interval this may be luck.")
    said = f"{rise}, 95% interval {low:+.2f} to {high:+.2f})."
    if low > 0:
        return Check(LEARNED, True, f"The policy learned. {said}")
    if high < 0:
        return Check(LEARNED, False, f"It got worse. {said}")
    return Check(LEARNED, False, f"No clear change. {said} The interval holds zero.")


def within_kl(summary: Mapping[str, Any], highest: float | None = None) -> Check:
    """Whether the policy stayed near its reference; `highest` is the largest KL of any step."""
    kl, limit = figure(summary, "kl"), figure(summary, "kl_limit")
    seen = [value for value in (kl, highest) if value is not None]
    if not seen or limit is None:
        return Check("Near its reference?", None, "KL to the reference is not known.")
    last = f"{kl:.2f} nats a response" if kl is not None else "not measured at the end"
    peak = f", {highest:.2f} at its highest step" if highest is not None else ""
    side = "under" if max(seen) <= limit else "over"
    return Check(
        "Near its reference?", max(seen) <= limit, f"KL to the reference {last}{peak}: {side} its limit of {limit:g}."
    )


def engine_agrees(summary: Mapping[str, Any]) -> Check:
    """Whether the engine sampled from the weights that the learner held."""
    gap = figure(summary, "mismatch_max_abs")
    if gap is None:
        return Check(
            "Sampled from the learner's weights?", None, "The engine's log-probs were not compared with the learner's."
        )
    side = "within" if gap <= MISMATCH_LIMIT else "beyond"
    said = f"The engine's and the learner's log-probs differ by at most {gap:.1e}: {side} {MISMATCH_LIMIT:.0e}."
    return Check("Sampled from the learner's weights?", gap <= MISMATCH_LIMIT, said)


def stays_varied(summary: Mapping[str, Any]) -> Check:
    """Whether the answers kept their variety, or collapsed into a few that please the reward model."""
    before, after = figure(summary, "distinct_2", "before"), figure(summary, "distinct_2", "after")
    share = figure(summary, "top_answer_share", "after")
    if before is None or after is None:
        return Check("Answers still varied?", None, "The answers' variety was not measured.")
    passed, said = after >= LEAST_DISTINCT_KEPT * before, f"Distinct bigrams went from {before:.3f} to {after:.3f}"
    if share is not None:
        passed = passed and share <= MOST_TOP_ANSWER
        said += f"; the most frequent answer is {share:.1%} of the samples"
    return Check(
        "Answers still varied?", passed, f"{said}: {'varied enough' if passed else 'the answers have collapsed'}."
    )
