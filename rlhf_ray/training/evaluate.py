"""What a policy is worth on prompts that no training step saw."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_ray.algo.ranking import bootstrap_mean_ci, distinct_n
from rlhf_ray.config import Config
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.training.ppo import Roles
from rlhf_ray.training.sampling import exchanges_of, requests_for
from rlhf_ray.types import Prompt, Rollout, Sampling

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
    roles: Roles,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    samples: int,
    name: str,
) -> Evaluation:
    """Samples, scores and measures the policy that the generators hold."""
    prompts = recipe.held_out_prompts
    sampling = Sampling(config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens)
    requests = requests_for(
        prompts, tokenizer, run_id=str(config.run.id), step=name, samples=samples, room=sampling.max_tokens
    )
    rollouts = roles.generators.generate(requests, sampling)
    exchanges = exchanges_of(rollouts, prompts, tokenizer)
    scores = roles.scorers.score(exchanges)
    gold = [recipe.gold(exchange.prompt, exchange.response) for exchange in exchanges]
    known = [value for value in gold if value is not None]
    return Evaluation(
        answers=_rows([exchange.response for exchange in exchanges], samples),
        scores=_rows(scores, samples),
        gold=_rows(known, samples) if known else None,
        finished=statistics.fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        rollouts=rollouts,
    )


def compare(before: Evaluation, after: Evaluation, *, seed: int) -> dict[str, Any]:
    """The part of `summary.json` that sets the trained policy beside the one it started from.

    The interval of the gain is a paired bootstrap over prompts; diversity is measured on as many answers of each.
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
        "reward": {"before": before.mean_score, "after": after.mean_score, "sd_before": before.score_sd},
        "distinct_2": {"before": diversity(before, n), "after": diversity(after, n)},
        "top_answer_share": {"before": top_share(before, n), "after": top_share(after, n)},
        "finished": {"before": before.finished, "after": after.finished},
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
