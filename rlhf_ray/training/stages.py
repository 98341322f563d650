"""A whole run: base policy, feedback, reward model, PPO, evaluation, report.

Each stage leaves a result in the run folder that appears whole or not at all, and is passed over where that result is
there already. So one command both runs and resumes, and `run.from` is no more than another folder to find results in.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.recipes.preferences import PreferencesRecipe
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.placement import Placement, start_ray
from rlhf_ray.training.base_policy import make_base_policy
from rlhf_ray.training.beginning import check_models, check_source, take_over, trained_policy
from rlhf_ray.training.collect import bring_over, collect_again, collect_from_annotators, collect_from_people
from rlhf_ray.training.diagnosis import diagnose
from rlhf_ray.training.direct import make_direct_policy
from rlhf_ray.training.improve import improve
from rlhf_ray.training.metrics import read_metrics
from rlhf_ray.training.recipe import drop_long_prompts, make_recipe
from rlhf_ray.training.report import write_report
from rlhf_ray.training.reward.measure import how_right
from rlhf_ray.training.reward.stage import check_feedback, make_cross_validation, make_reward_model
from rlhf_ray.training.reward.validate import FOLD
from rlhf_ray.training.run_folder import RunFolder, existing_run
from rlhf_ray.training.stopping import Stopping
from rlhf_ray.training.trainer import drop_checkpoints
from rlhf_ray.training.verdict import closing_lines

Stage = Literal["base_policy", "reward_model", "ppo"]
Say = Callable[[str], None]


def run_stages(config: Config, *, until: Stage, say: Say) -> Path:
    """Runs what is missing up to a stage, and returns the run folder."""
    if config.run.id is None:
        raise ConfigError("the run has no name: give a config file, or set run.id")
    recipe = make_recipe(config)  # reads the data before anything is written
    check_models(config)
    check_source(config)
    if isinstance(recipe, PreferencesRecipe) and config.needs_reward_model and _learns_from_its_own(config):
        check_feedback(recipe.train, config)  # before there is a folder, which would keep to these settings
    stopping = Stopping()
    with ExitStack() as stack:
        stack.enter_context(stopping.listening())
        folder = RunFolder.open(config)
        stack.callback(folder.close)
        take_over(config, folder, say=say)
        if folder.read_json("summary.json") is not None and _finished(config, folder):
            say(f"run {folder.path} is done (a new one takes another run.id); report: {folder.path / 'report.html'}")
            return folder.path
        run = Run(config, folder, recipe, stopping, say, stack)
        run.base_policy()
        if until != "base_policy":
            run.reward_model()
        if until == "reward_model" and folder.reward_model.exists():
            say(f"reward model: {folder.reward_model}; report: {write_report(folder.path)}")
        if until == "ppo":
            run.improve()
        return folder.path


class Run:
    """One run under way. Ray and the engines start with the first stage that needs them."""

    def __init__(
        self, config: Config, folder: RunFolder, recipe: Recipe, stopping: Stopping, say: Say, stack: ExitStack
    ) -> None:
        self.config, self.folder, self.recipe = config, folder, recipe
        self.stopping, self.say = stopping, say
        self._stack = stack
        self._placement: Placement | None = None
        self._generators: GeneratorGroup | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def placement(self) -> Placement:
        """Ray, started once."""
        if self._placement is None:
            self.say("starting Ray" if self.config.resources.address is None else "joining Ray")
            self._placement = self._stack.enter_context(start_ray(self.config))
            self.stopping.listen_again()
        return self._placement

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base policy's, held to the context; what it shows to be too long is dropped from the recipe once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder.base_policy, context=self.config.model.context)
            dropped = drop_long_prompts(self.recipe, self._tokenizer, self.config)
            if dropped:
                self.say(f"{dropped} prompts skipped: longer than the context allows")
        return self._tokenizer

    @property
    def generators(self) -> GeneratorGroup:
        """The engines, started once, at first with the base policy; ready after `placement.wait_ready`."""
        if self._generators is None:
            self._generators = self.placement.start_generators(self.folder.base_policy, weights_step=0, say=self.say)
        return self._generators

    def base_policy(self) -> None:
        """Trains the policy to start from."""
        if self.folder.base_policy.exists():
            return
        with self._timed("base_policy"):
            record = self.placement.run_task(
                make_base_policy,
                self.config,
                self.folder.base_policy,
                pretrained=self.folder.pretrained,
                fits=self.folder.fits,
                doing="training the base policy",
                deadline_s=self.config.resources.fit_deadline_s,
                on_line=self.say,
            )
            self.folder.write_json("base.json", record)
            self._drop_fits("pretrain", "sft")

    def reward_model(self) -> None:
        """Collects feedback and trains the reward model from a frozen snapshot of it, where anything reads one."""
        if not self.config.needs_reward_model:
            return
        if self.config.method != "rl":
            self._collect_feedback()
        if self.config.reward_model.path is not None:
            if not self.folder.reward_model.exists():
                shutil.copytree(self.config.reward_model.path, self.folder.reward_model)
            return
        judged = self.config.reward_model.judge
        wanted = [self.folder.reward_model, *([self.folder.judge] if judged else [])]
        if not all(folder.exists() for folder in wanted):
            self._collect_feedback()
            self._refresh_feedback()
        if judged and (self.folder.read_json("reward_model.json") or {"half": 0}).get("half") is None:
            raise ConfigError(
                "reward_model.judge: this run's reward model has learnt from all annotators, the judge's too; "
                "set run.take=feedback, so that it learns from its half"
            )
        record = self._reward_model(self.folder.reward_model, "reward_model.json", half=0 if judged else None)
        if record:
            self.say(f"reward model: {how_right(record)}")
        if judged:
            self._reward_model(self.folder.judge, "judge.json", half=1)
        self._cross_validate()

    def _reward_model(self, folder: Path, record_name: str, *, half: int | None) -> dict[str, Any] | None:
        """A reward model from the frozen feedback, and what it came to; None where it is there already."""
        if folder.exists():
            return None
        with self._timed(folder.name):
            part = self.folder.path / f".{folder.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            doing = f"training the {folder.name.replace('_', ' ')}"
            record = self._fit_on_feedback(
                make_reward_model,
                self._reward_body,
                part,
                doing=doing,
                half=half,
                fits=self.folder.fits,
                ranks=self.config.resources.learner_ranks,
            )
            self.folder.write_json(record_name, record)
            part.rename(folder)  # last, for its presence says that the stage is done
            self._drop_fits(*(path.name for path in self.folder.fits.glob(f"{folder.name}*")))  # of all its models
        return record

    def improve(self) -> None:
        """Trains the policy, measures it on held-out prompts, and writes summary and report."""
        start = time.monotonic()
        if self.config.method != "rl":
            self._learn_directly()
        with self._timed("ppo" if self.config.method == "rl" else "evaluation"):
            improve(self)
        for line in closing_lines(self.folder.read_json("summary.json")):
            self.say(line)
        for finding in diagnose(read_metrics(self.folder.path), self.config.model_dump(mode="json")):
            self.say(f"Why is the reward flat? {finding.cause}: {finding.evidence}. What to do: {finding.remedy}")
        took = f"{self._how} and evaluation took {time.monotonic() - start:.0f} s"
        self.say(f"report: {write_report(self.folder.path)}  ({took})")

    def _learn_directly(self) -> None:
        """DPO, IPO or KTO from the frozen feedback."""
        if self.folder.direct_policy.exists():
            return
        with self._timed(self.config.method):
            part = self.folder.path / ".direct_policy.part"
            shutil.rmtree(part, ignore_errors=True)
            doing = f"{self.config.method} from the feedback"
            record = self._fit_on_feedback(
                make_direct_policy, self.folder.base_policy, part, doing=doing, fits=self.folder.fits
            )
            self.folder.write_json("direct.json", record)
            part.rename(self.folder.direct_policy)  # last, for its presence says that the stage is done
            self._drop_fits(self.config.method)

    @property
    def _how(self) -> str:
        return "PPO" if self.config.method == "rl" else self.config.method.upper()

    @property
    def _store(self) -> str:
        """Where this run's feedback lies."""
        return self.folder.store(self.config)

    @property
    def _older_store(self) -> str:
        """Where that of `run.from` lies, or this run's own where that one has none to give."""
        assert self.config.run.from_ is not None, "the config sees to that"
        source, config = existing_run(self.config.run.from_)
        return self._store if source.read_json("feedback.json") is None else source.store(config)

    def _collect_feedback(self) -> None:
        """Asks the people, or the recipe's annotators, once, and freezes what they said."""
        if self.folder.read_json("feedback.json") is not None:
            return
        with self._timed("feedback"), FeedbackStore(self._store) as store:
            if isinstance(self.recipe, PreferencesRecipe):
                record = collect_from_people(store, self.recipe, self.config, say=self.say)
            else:
                generators = self.generators
                self.placement.wait_ready(say=self.say)
                record = collect_from_annotators(
                    store, self.recipe, generators, tokenizer=self.tokenizer, config=self.config, say=self.say
                )
            self.folder.write_json("feedback.json", record)

    def _refresh_feedback(self) -> None:
        """Has the newer policy's answers judged too, once, where that is asked for."""
        before = self.folder.read_json("feedback.json")
        if not self.config.reward_model.refresh or "refreshed_from" in before:
            return
        newer = self.newer_policy()
        with self._timed("refreshed_feedback"), FeedbackStore(self._store) as store:
            # not only at take_over: `feedback.store` may be another one, and people may have judged into theirs since
            known = bring_over(store, older=self._older_store, snapshot=before["snapshot"])
            if isinstance(self.recipe, PreferencesRecipe):
                record = collect_again(store, known=known, say=self.say)
            else:
                generators = self.placement.start_generators(newer, weights_step=0, say=self.say)
                self.placement.wait_ready(say=self.say)
                record = collect_from_annotators(
                    store,
                    self.recipe,
                    generators,
                    tokenizer=self.tokenizer,
                    config=self.config,
                    say=self.say,
                    sampler="current-policy",
                )
                self.placement.stop(generators)
            self.folder.write_json("feedback.json", {**record, "refreshed_from": before["snapshot"]})

    def newer_policy(self) -> Path:
        """The one that `run.from` has trained; `InputError` where it has not yet."""
        assert self.config.run.from_ is not None, "the config sees to that"
        return trained_policy(existing_run(self.config.run.from_)[0])

    def _cross_validate(self) -> None:
        """Adds to the record what reward models of all folds are worth, where that is asked for and not there yet."""
        record = self.folder.read_json("reward_model.json")
        if not self.config.reward_model.cross_validation or not record or record["cross_validation"]:
            return
        with self._timed("cross_validation"):
            record["cross_validation"] = self._fit_on_feedback(
                make_cross_validation, self._reward_body, doing="cross-validating", fits=self.folder.fits
            )
            self.folder.write_json("reward_model.json", record)
            folds = record["cross_validation"]
            self.say(f"reward models of {folds['folds']} folds: {how_right(folds)}")
            self._drop_fits(*(path.name for path in self.folder.fits.glob(f"{FOLD}*")))

    @property
    def _reward_body(self) -> Path:
        """The model whose body a reward model starts as: none that has imitated what it is measured on."""
        if not self.config.imitates_judged_answers:
            return self.folder.base_policy
        if self.config.model.path is not None:
            return self.config.model.path
        if not self.folder.pretrained.exists():
            raise InputError(
                f"{self.folder.path} has no `pretrained`, the model before it imitated anybody, for a reward model to "
                "start as: its base policy is an older version's; begin a new run"
            )
        return self.folder.pretrained

    def _fit_on_feedback(
        self, fit: Callable[..., dict[str, Any]], *folders: Path, doing: str, **more: Any
    ) -> dict[str, Any]:
        """What a fit on the frozen feedback came to, made in a process of its own.

        folders: of the model that it starts as, and of the one that it makes.
        """
        record: dict[str, Any] = self.placement.run_task(
            fit,
            self.config,
            *folders,
            store=self._store,
            snapshot=self.folder.read_json("feedback.json")["snapshot"],
            **more,
            doing=doing,
            deadline_s=self.config.resources.fit_deadline_s,
            on_line=self.say,
        )
        return record

    def _drop_fits(self, *stages: str) -> None:
        """Their results are whole: nobody goes back to the checkpoints of the fits."""
        for stage in stages:
            drop_checkpoints(self.folder.fits / stage)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Says that a stage begins, and adds its seconds to `stages.json`."""
        self.say(f"== {stage.replace('_', ' ')}")
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.folder.read_json("stages.json") or {}
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
            self.folder.write_json("stages.json", seconds)


def _learns_from_its_own(config: Config) -> bool:
    """Whether the recipe brings all feedback that there will be, and none is frozen yet."""
    frozen = config.run.root / str(config.run.id) / "feedback.json"
    return config.run.from_ is None and config.feedback.store is None and not frozen.exists()


def _finished(config: Config, folder: RunFolder) -> bool:
    summary = folder.read_json("summary.json")
    wanted = config.ppo.steps if config.method == "rl" else 0
    return bool(summary["steps"] >= wanted) and folder.policy.exists()
