"""Looks at held-out prompts while PPO goes on: what the policy earns there, whether it is exploiting the reward model,
and which step's policy was the best.

A judge is a second reward model, learnt from other people's feedback, that PPO never sees (`reward_model.judge`). While
the policy gets better, both rise. Once it finds what only the first one likes, the judge's scores fall while the first
one's go on rising: Gao et al. 2023 (arXiv:2210.10760). That sounds an alarm, and the best look's policy is kept.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.algo.evaluation import paired_z
from rlhf_ray.config import Config
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.rewards.model import Scoring
from rlhf_ray.roles.groups import LearnerGroup
from rlhf_ray.training.run_folder import BEST, RunFolder
from rlhf_ray.training.sampling import Generating, answers_to, gold_of
from rlhf_ray.types import Exchange

SURE = 2.0
"""Standard errors by which the judge's scores have to fall before it counts."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Look:
    """What the held-out answers of one step were worth; one number a prompt."""

    step: int
    rewards: Sequence[float]
    judged: Sequence[float]
    """By the judge; without one, the rewards again."""


class HeldOut:
    """Looks every `evaluate.every` steps."""

    def __init__(
        self,
        recipe: Recipe,
        generators: Generating,
        scorers: Scoring,
        judges: Scoring | None,
        learner: LearnerGroup,
        *,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        folder: RunFolder,
        say: Say,
    ) -> None:
        self.recipe, self.generators, self.scorers, self.judges = recipe, generators, scorers, judges
        self.learner, self.tokenizer, self.config, self.folder, self.say = learner, tokenizer, config, folder, say
        self.best: Look | None = None
        self._warned_of: int | None = None
        """The best step since which the alarm has been said; once is enough."""

    def resume(self, step: int) -> None:
        """Takes up the best look so far; what a resumed run makes anew is forgotten."""
        kept = self.folder.read_json(BEST)
        if kept is not None and kept["step"] > step:
            (self.folder.path / BEST).unlink()
        elif kept is not None:
            self.best = Look(kept["step"], kept["rewards"], kept["judged"])

    def look(self, step: int) -> dict[str, float]:
        """Metrics of the policy as it stands after `step` steps; nothing where no look is due."""
        every = self.config.evaluate.every
        if not every or step % every:
            return {}
        exchanges = answers_to(
            self.recipe.held_out_prompts[: self.config.evaluate.prompts],
            self.generators,
            tokenizer=self.tokenizer,
            config=self.config,
            samples=1,
            step="look",  # the same draws at each look, so that two of them compare
        )[1]
        rewards = self.scorers.score(exchanges)
        judged = self.judges.score(exchanges) if self.judges else rewards
        look = Look(step, rewards, judged)
        alarm = self.best is not None and exploited(self.best, look)
        if self.best is not None and alarm and self.best.step != self._warned_of:
            self._warned_of = self.best.step
            self.say(warning(self.best, look))
        if self.best is None or statistics.fmean(judged) > statistics.fmean(self.best.judged):
            self._keep(look)
        return {
            "held_out/reward": statistics.fmean(rewards),
            "held_out/judge": statistics.fmean(judged),
            "held_out/alarm": float(alarm),
            **self._gold(exchanges),
        }

    def _keep(self, look: Look) -> None:
        self.best = look
        self.learner.save_policy(self.folder.best_policy)
        by = "the judge" if self.judges else "the reward model"
        self.folder.write_json(BEST, {**asdict(look), "by": by})

    def _gold(self, exchanges: Sequence[Exchange]) -> dict[str, float]:
        known = gold_of(self.recipe, exchanges, self.config)
        return {"held_out/gold": statistics.fmean(known)} if known else {}


def exploited(best: Look, now: Look) -> bool:
    """Whether the judge's scores have fallen for sure since the best look, and the reward model's have not."""
    fell = paired_z(now.judged, best.judged) < -SURE
    return fell and statistics.fmean(now.rewards) >= statistics.fmean(best.rewards)


def warning(best: Look, now: Look) -> str:
    """What the log says then."""
    rise, fall = (
        abs(statistics.fmean(late) - statistics.fmean(early)) / (statistics.pstdev(early) or 1.0)
        for late, early in ((now.rewards, best.rewards), (now.judged, best.judged))
    )
    return (
        f"WARNING: the policy is exploiting the reward model: since step {best.step} its scores of held-out answers "
        f"rose by {rise:.2f} standard deviations, and the judge's fell by {fall:.2f}. That step's policy is kept in "
        "best_policy; raise ppo.kl.coef, or give more feedback"
    )
