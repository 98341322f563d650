"""What a policy is worth on prompts that no training step saw."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algo.evaluation import (
    best_of_n,
    best_of_n_kl,
    length_controlled_win_rate,
    repetition,
    self_bleu,
    win_rate,
    win_shares,
)
from rlhf_ray.algo.ranking import bootstrap_mean_ci, distinct_n, expected_calibration_error
from rlhf_ray.config import Config
from rlhf_ray.recipes.annotators import TIE
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.rewards.model import Scoring
from rlhf_ray.training.sampling import Generating, answers_to, gold_of
from rlhf_ray.types import Prompt, Rollout

Item = TypeVar("Item")

SHOWN = 10
"""Prompts whose answers the report prints."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One policy's answers to the held-out prompts; rows are prompts, columns samples."""

    answers: list[list[str]]
    scores: list[list[float]]
    """By the reward model."""
    gold: list[list[float]] | None
    finished: float
    """Share of answers that came to their end by themselves."""
    rollouts: Sequence[Rollout] = ()
    """The same answers in tokens; not kept in JSON."""

    @property
    def mean_score(self) -> float:
        """Mean over all answers."""
        return statistics.fmean(value for row in self.scores for value in row)

    @property
    def score_sd(self) -> float:
        """Standard deviation over all answers."""
        return statistics.pstdev(value for row in self.scores for value in row)

    def gold_by_prompt(self) -> list[float] | None:
        """Each prompt's mean gold."""
        return None if self.gold is None else [statistics.fmean(row) for row in self.gold]

    def best_gold(self) -> float | None:
        """Mean over prompts of the best answer's gold: what choosing among the samples could reach."""
        return None if self.gold is None else statistics.fmean(max(row) for row in self.gold)

    def to_json(self) -> dict[str, Any]:
        """As JSON, from which `Evaluation(**content)` makes it again."""
        return {name: value for name, value in asdict(replace(self, rollouts=())).items() if name != "rollouts"}


def evaluate(
    recipe: Recipe,
    generators: Generating,
    scorers: Scoring,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    samples: int,
    name: str,
) -> Evaluation:
    """Samples, scores and measures the policy that the generators hold."""
    rollouts, exchanges = answers_to(
        recipe.held_out_prompts, generators, tokenizer=tokenizer, config=config, samples=samples, step=name
    )
    scores = scorers.score(exchanges)
    known = gold_of(recipe, exchanges, config)
    return Evaluation(
        answers=_rows([exchange.response for exchange in exchanges], samples),
        scores=_rows(scores, samples),
        gold=_rows(known, samples) if known else None,
        finished=statistics.fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        rollouts=rollouts,
    )


def compare(before: Evaluation, after: Evaluation, *, seed: int, logit_scale: float | None = None) -> dict[str, Any]:
    """The part of `summary.json` that sets the trained policy beside the one it started from.

    The interval of the gain is a paired bootstrap over prompts; diversity is measured on as many answers of each.
    `logit_scale`: what turns a difference of the reward model's scores into log-odds, where that is known.
    """
    n = min(len(before.answers[0]), len(after.answers[0]))
    gold_before, gold_after = before.gold_by_prompt(), after.gold_by_prompt()
    gold = None
    if gold_before is not None and gold_after is not None:
        gains = [late - early for early, late in zip(gold_before, gold_after, strict=True)]
        gold = {
            "before": statistics.fmean(gold_before),
            "after": statistics.fmean(gold_after),
            "gain_ci95": list(bootstrap_mean_ci(gains, seed=seed)),
            "after_ci95": list(bootstrap_mean_ci(gold_after, seed=seed)),
            "best_of_n": {"n": len(before.answers[0]), "gold": before.best_gold()},
        }
    return {
        "gold": gold,
        "win_rate": {"by": "gold" if gold else "the reward model", **wins(before, after, seed=seed)},
        "reward": {"before": before.mean_score, "after": after.mean_score, "sd_before": before.score_sd},
        "best_of_n_by_reward": choosing(before),
        "ordering": {
            name: ordering(evaluation, seed=seed, logit_scale=logit_scale)
            for name, evaluation in (("before", before), ("after", after))
        }
        if gold
        else None,
        "distinct_2": {"before": diversity(before, n), "after": diversity(after, n)},
        "top_answer_share": {"before": top_share(before, n), "after": top_share(after, n)},
        "finished": {"before": before.finished, "after": after.finished},
        "text": {"before": texture(before, n), "after": texture(after, n)},
    }


def wins(before: Evaluation, after: Evaluation, *, seed: int) -> dict[str, Any]:
    """How often an answer of `after` beats one of `before` to the same prompt, by gold where it is known or by score.

    `rate` with its interval over prompts, and `length_controlled`: what it would be at equal lengths in characters.
    """
    judged = "gold" if before.gold is not None and after.gold is not None else "scores"
    ours, theirs = getattr(after, judged), getattr(before, judged)
    n = min(len(ours[0]), len(theirs[0]))
    rate, interval = win_rate([row[:n] for row in ours], [row[:n] for row in theirs], seed=seed)
    pairs = [
        (win_shares([[a]], [[b]])[0], float(len(text) - len(other)))
        for rows in zip(ours, theirs, after.answers, before.answers, strict=True)
        for a, b, text, other in zip(*(row[:n] for row in rows), strict=True)
    ]
    controlled = length_controlled_win_rate(*map(list, zip(*pairs, strict=True)))
    return {"rate": rate, "ci95": list(interval), "length_controlled": controlled}


def choosing(evaluation: Evaluation) -> list[dict[str, float | None]]:
    """Reward and gold of the best of n answers by the reward model, for each n: what sampling more does without PPO.

    Drawn beside PPO along `kl`, it shows which of the two exploits the reward model sooner: Gao et al. 2023
    (arXiv:2210.10760), figure 1.
    """

    def means(rows: list[list[float]]) -> list[float]:
        chosen = [best_of_n(scores, values) for scores, values in zip(evaluation.scores, rows, strict=True)]
        return [statistics.fmean(column) for column in zip(*chosen, strict=True)]

    reward = means(evaluation.scores)
    gold = means(evaluation.gold) if evaluation.gold is not None else [None] * len(reward)
    return [
        {"n": n, "kl": best_of_n_kl(n), "reward": r, "gold": g}
        for n, (r, g) in enumerate(zip(reward, gold, strict=True), 1)
    ]


def ordering(evaluation: Evaluation, *, seed: int, logit_scale: float | None) -> dict[str, Any]:
    """How often the reward model orders two answers to one prompt as gold does, among those that gold tells apart.

    Of the trained policy's answers it says whether the reward model still knows better where the policy has gone. The
    interval is over prompts; `ece` is the calibration error of sigmoid(logit_scale * difference of the scores).
    """
    assert evaluation.gold is not None, "the caller asks where gold is known"
    by_prompt, margins = [], []
    for scores, gold in zip(evaluation.scores, evaluation.gold, strict=True):
        told_apart = [
            (scores[i] - scores[j]) * (1 if gold[i] > gold[j] else -1)
            for i in range(len(gold))
            for j in range(i)
            if abs(gold[i] - gold[j]) >= TIE
        ]
        if told_apart:
            by_prompt.append(statistics.fmean(float(margin > 0) for margin in told_apart))
            margins += told_apart
    if not margins:
        return {"pairs": 0, "accuracy": None, "accuracy_ci95": None, "ece": None}
    sure = None
    if logit_scale is not None:
        confidence = torch.sigmoid(logit_scale * torch.tensor(margins).abs())
        sure = expected_calibration_error(confidence, [float(margin > 0) for margin in margins])
    return {
        "pairs": len(margins),
        "accuracy": statistics.fmean(by_prompt),
        "accuracy_ci95": list(bootstrap_mean_ci(by_prompt, seed=seed)),
        "ece": sure,
    }


def texture(evaluation: Evaluation, n: int) -> dict[str, float | None]:
    """What the first n answers to each prompt are like: words, how alike they are, how much each repeats itself."""
    rows = [[answer.split() for answer in row[:n]] for row in evaluation.answers]
    return {
        "words": statistics.fmean(len(words) for row in rows for words in row),
        "self_bleu": statistics.fmean(self_bleu(row) for row in rows) if n > 1 else None,
        "repetition": statistics.fmean(repetition(words) for row in rows for words in row),
    }


def diversity(evaluation: Evaluation, n: int) -> float:
    """distinct-2 over the first n answers to each prompt: the share of word pairs that are different ones."""
    return distinct_n([answer.split() for row in evaluation.answers for answer in row[:n]], 2)


def top_share(evaluation: Evaluation, n: int) -> float:
    """The share of the commonest answer among the first n to each prompt."""
    counts = Counter(answer for row in evaluation.answers for answer in row[:n])
    return counts.most_common(1)[0][1] / counts.total()


def shown_samples(prompts: Sequence[Prompt], before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """The first answers to some prompts, spread over the held-out ones, before and after, for the report."""
    return [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "before": before.answers[row][0],
            "after": after.answers[row][0],
            "gold_before": before.gold[row][0] if before.gold else None,
            "gold_after": after.gold[row][0] if after.gold else None,
            "reward_before": before.scores[row][0],
            "reward_after": after.scores[row][0],
        }
        for row, prompt in list(enumerate(prompts))[:: max(1, len(prompts) // SHOWN)][:SHOWN]
    ]


def _rows(flat: Sequence[Item], width: int) -> list[list[Item]]:
    return [list(flat[start : start + width]) for start in range(0, len(flat), width)]
