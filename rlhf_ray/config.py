"""One typed tree for everything a run can be told; the defaults are the laptop demo.

`load_config` reads YAML, applies dotted overrides and refuses unknown keys by naming the nearest known one.
Imports nothing heavy, so that `rlhf config` and `rlhf --help` answer at once.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlhf_ray.errors import ConfigError
from rlhf_ray.presets import BY_ADVANTAGE, GOVERNED, GROUPED, with_presets

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Advantage = Literal["gae", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "rloo", "grpo", "dr_grpo", "remax"]
PolicyLoss = Literal["clip", "dual_clip", "gspo", "cispo", "reinforce"]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the tree: closed, frozen, documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)


AnySection = TypeVar("AnySection", bound=Section)


class RunConfig(Section):
    """Where a run lies and what it goes on from."""

    id: Name | None = None
    """The run's folder under `root`; by default the config file's name. The same id resumes."""
    root: Path = Path("runs")
    """Where run folders are made; on a cluster, a disk that every node sees."""
    from_: Path | None = Field(default=None, alias="from")
    """A run folder whose stages before PPO are taken over instead of made again, as far as `take` says."""
    take: Literal["base_policy", "feedback", "reward_model"] = "reward_model"
    """The last stage that is taken over from `from`."""


class DataConfig(Section):
    """The prompts and the people's choices that a run reads."""

    path: Path | None = None
    """Human preferences, one JSON object a line, plain or gzip. Only for `recipe: preferences`."""
    format: Literal["hh", "pairs"] = "hh"
    """`hh`: `chosen` and `rejected` dialogues as HH-RLHF writes them; `pairs`: `prompt`, `chosen`, `rejected`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or skip it and say how many were skipped and why."""
    prompts: Count = 2400
    """Distinct prompts that a generated recipe makes, held-out ones included."""
    held_out: Count = 200
    """Prompts that no training stage sees."""


class ModelConfig(Section):
    """The policy: a folder to start from, or the size of a new one."""

    path: Path | None = None
    """A Hugging Face folder to start from; without it a small Llama is trained from scratch."""
    vocabulary: Annotated[int, Field(ge=260)] = 1024
    """Tokens of a new tokenizer, at most; 256 of them are bytes."""
    hidden: Count = 128
    """Width of a new model."""
    layers: Count = 4
    """Depth of a new model."""
    heads: Count = 4
    """Attention heads of a new model; vLLM on CPU takes only some sizes of a head."""
    intermediate: Count = 384
    """Width of a new model's feed-forward layers."""
    context: Count = 256
    """Longest prompt plus response, in tokens."""


class LoRAConfig(Section):
    """Learning through small matrices beside the policy's and the critic's own, which then stay as they are."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Width of the matrices; 0: all weights learn."""
    alpha: Count = 32
    """What the matrices add is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get them, such as `q_proj`; by default every linear layer."""


class FitConfig(Section):
    """A supervised fit that ends when its validation loss is flat."""

    learning_rate: Positive = 3e-3
    """Of AdamW, after a short warm-up."""
    batch_size: Count = 32
    """Sequences an optimizer step."""
    max_epochs: Annotated[float, Field(ge=0)] = 10
    """Upper bound; the fit usually ends sooner. 0 leaves the fit out."""
    eval_every: Count = 50
    """Optimizer steps between two looks at the validation loss."""
    patience: Count = 3
    """Looks without improvement before the loss counts as flat."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.003
    """Nats; a smaller gain is no improvement."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of AdamW."""
    tail: Positive = 0.2
    """Steps over which the learning rate falls to zero, as a share of those before; noisy labels want many."""


class PretrainConfig(FitConfig):
    """Self-supervised, on the recipe's texts."""

    batch_size: Count = 16
    eval_every: Count = 100
    min_improvement: Annotated[float, Field(ge=0)] = 0.015


class SFTConfig(FitConfig):
    """Supervised, on the demonstrations."""

    learning_rate: Positive = 2e-3
    batch_size: Count = 16
    eval_every: Count = 100
    min_improvement: Annotated[float, Field(ge=0)] = 0.015


class RewardFitConfig(FitConfig):
    """Of the reward model, on what people said."""

    learning_rate: Positive = 7e-4
    batch_size: Count = 12
    """Answers an optimizer step; all answers to one prompt stay together."""
    max_epochs: Annotated[float, Field(ge=0)] = 2
    eval_every: Count = 400
    tail: Positive = 2.0


class AnnotatorConfig(Section):
    """The simulated people of a generated recipe."""

    count: Count = 8
    """How many people judge."""
    flip: Probability = 0.1
    """Share of choices that an annotator gets the wrong way round."""
    rating_noise: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation on the 1 to 5 scale."""
    rating_bias: Annotated[float, Field(ge=0)] = 0.3
    """Standard deviation, over annotators, of how much too kind or harsh each is."""


class FeedbackConfig(Section):
    """What the base policy's answers are judged by, and where the judgements lie."""

    store: str | None = None
    """Database URL; by default `feedback.db` in the run folder."""
    prompts: Count = 1500
    """Training prompts whose answers are judged."""
    answers: Annotated[int, Field(ge=2, le=16)] = 6
    """Answers sampled and ranked a prompt."""
    annotators: AnnotatorConfig = AnnotatorConfig()


class RewardModelConfig(Section):
    """How a model of what people prefer is learnt from a snapshot of feedback."""

    path: Path | None = None
    """A reward model to use as it is: any sequence classifier with one label."""
    feedback: Literal["pairs", "ratings"] = "pairs"
    """Learn from rankings, pair by pair (ranking loss), or from ratings (MSE)."""
    backbone: Literal["decoder", "encoder"] = "decoder"
    """`decoder`: starts as the base policy's body; `encoder`: a small BERT with its own tokenizer."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts whose feedback only measures."""
    cross_validation: Annotated[int, Field(ge=0)] = 0
    """Folds to train besides, for an accuracy with a small interval on few pairs; 0: none."""
    judge: bool = False
    """Learn from one half of the annotators, and a second model from the other half: that one only measures
    (`evaluate.every`)."""
    limit: Count | None = None
    """A control: learn from so many comparisons or ratings only. What PPO then finds is what they left open."""
    shuffle_labels: bool = False
    """A control: learn from labels that say nothing. What PPO then gains is luck."""
    fit: RewardFitConfig = RewardFitConfig()


class DirectConfig(FitConfig):
    """Learning from the judgements themselves (`method: dpo`, `ipo`, `kto`)."""

    learning_rate: Positive = 3e-4
    batch_size: Count = 16
    """Choices, or judged answers, an optimizer step."""
    max_epochs: Annotated[float, Field(ge=0)] = 1
    eval_every: Count = 50
    min_improvement: Annotated[float, Field(ge=0)] = 0.001
    beta: Positive = 0.5
    """How dear it is to leave the reference, a nat."""
    pairs: Count = 4
    """Choices of one prompt that are learnt from, at most."""
    good_from: Annotated[float, Field(gt=1, le=5)] = 4
    """`kto`: so many stars make an answer a good one."""
    weight_good: Positive = 1.0
    """`kto`: of good answers."""
    weight_bad: Positive = 1.0
    """`kto`: of bad ones; where one kind is rarer, let its weight make up for it."""


class RolloutConfig(Section):
    """How a step samples."""

    prompts: Count = 128
    """Prompts a step."""
    samples: Count = 1
    """Responses a prompt."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """How often prompts whose responses all earn the same are replaced by others within a step; 0: they stay."""
    temperature: Positive = 1.0
    """Log-probs are those of the tempered distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of probability that is sampled from; log-probs are those of this nucleus."""
    max_tokens: Count = 64
    """Longest response."""
    generators: Count = 1
    """vLLM engines, each an actor of its own: so many are wanted, and asked for at once."""
    min_generators: Count | None = None
    """Engines that the run starts with and does not go on without; the others join when their nodes come. By default
    all of them, and then each rollout has its fixed engine."""
    tolerance: Positive = 1e-4
    """Nats by which an engine's log-prob may differ from the learner's for the same weights; float32 holds 1e-4."""
    max_staleness: Literal[0] = 0
    """Weights steps that a rollout may lag behind the learner."""


class KLConfig(Section):
    """How the policy is held near the reference."""

    coef: Annotated[float, Field(ge=0)] = 0.15
    """Weight of the per-token KL penalty in the reward; where an adaptive controller starts."""
    target: Positive | None = None
    """Nats a response that an adaptive controller steers to; without it the coefficient is fixed."""
    horizon: Count = 2000
    """Rollouts over which the adaptive controller acts."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's KL is estimated from two log-probs: `algo/kl.py` has the formulas."""
    where: Literal["reward", "loss"] = "reward"
    """Subtracted from the reward, token by token, or added to the loss (where `k1` has no gradient)."""
    refresh_every: Annotated[int, Field(ge=0)] = 0
    """Steps after which the reference becomes the policy as it is; 0: it stays the base policy."""
    update_limit: Positive | None = None
    """Nats a token (`policy/approxkl_avg`) by which one update may move the policy; the rest of it is left out."""
    limit: Positive = 25.0
    """Nats a response, mean over a step; above it the run stops as diverged."""


class PPOConfig(Section):
    """The loop and its arithmetic."""

    steps: Count = 30
    """How often the loop goes round. A finished run goes on where it is raised."""
    advantage: Advantage = "gae"
    """How a token's part in the reward is found; docs/algorithms.md has what else comes with each."""
    loss: PolicyLoss = "clip"
    """What is minimised of the policy."""
    average: Literal["token", "sequence", "constant"] = "token"
    """A batch's loss is the mean over its tokens, over its responses' means, or its sum over a constant length."""
    credit: Literal["trajectory", "to_go"] = "trajectory"
    """`reinforce`: every token is credited with the whole return, or with what came after it."""
    epochs: Count = 2
    """Passes over a step's rollouts."""
    minibatch: Count = 32
    """Rollouts an optimizer step."""
    learning_rate: Positive = 3e-4
    """Of the policy's AdamW."""
    critic_learning_rate: Positive = 1e-3
    """Of the critic's AdamW."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Of GAE: 1 trusts returns alone, 0 the critic alone."""
    clip: Positive = 0.2
    """How far a probability ratio may fall below 1 before it earns nothing more."""
    clip_high: Positive | None = None
    """How far it may rise above 1; by default as far as it may fall."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """`dual_clip`: most that a token of negative advantage may cost, in advantages."""
    value_clip: Positive = 0.2
    """How far a value may move from the one at sampling before it earns nothing more."""
    value_coef: Positive = 0.5
    """Weight of the value loss."""
    value_norm: bool = False
    """The critic learns returns brought to mean 0 and standard deviation 1 by all that were seen."""
    critic_from: Literal["policy", "reward_model"] = "policy"
    """Whose body the critic starts with; a reward model's needs the policy's tokenizer."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """First steps, in which the critic alone learns."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an entropy bonus."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss on demonstrations that is mixed in (PPO-ptx)."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are scaled down to it, policy and critic apart."""
    whiten: Literal["batch", "group", "none"] = "batch"
    """Advantages with mean 0 and standard deviation 1 over a step's response tokens, or over each prompt's."""
    reward_norm: Literal["running", "batch", "group", "none"] = "running"
    """Rewards less a mean and over a standard deviation: of all so far, of the step, or of each prompt's. The standard
    deviation counts as 0.5 at least where the reward model was learnt here, for what its scores are worth is in their
    size already."""
    reward_clip: Positive | None = 5.0
    """After normalising."""
    missing_end_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Subtracted where a response was cut at `rollout.max_tokens`."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Last tokens before `rollout.max_tokens` over which a penalty grows to `overlong_penalty`; 0: none."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Subtracted from the longest response's reward."""
    length_penalty: float = 0.0
    """Subtracted a response token; below 0 it is a bonus."""
    correction: Literal["none", "token", "sequence", "band", "sequence_mask"] = "none"
    """Weights for rollouts whose behaviour log-probs differ from the learner's; `algo/correction.py` has formulas."""
    correction_low: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """`band`, `sequence_mask`: smaller ratios weigh nothing."""
    correction_high: Annotated[float, Field(gt=1)] = 2.0
    """Larger ratios are cut to it, or weigh nothing."""
    permute_rewards: bool = False
    """A control: rewards permuted within each batch. What PPO then gains is luck."""
    kl: KLConfig = KLConfig()


class EvaluateConfig(Section):
    """How the policy is measured on held-out prompts."""

    samples: Count = 4
    """Responses a held-out prompt, after training."""
    best_of: Count = 16
    """Responses a held-out prompt, before training; the best by gold shows what was within reach."""
    every: Annotated[int, Field(ge=0)] = 0
    """PPO steps between two looks at held-out prompts while it goes on; the best look's policy is the run's. 0: no
    looks, and the last policy is."""
    prompts: Annotated[int, Field(ge=2)] = 64
    """Held-out prompts of a look, at most, one response each."""


class CheckpointConfig(Section):
    """How often a run can be gone back to."""

    every: Count = 10
    """PPO steps between two checkpoints; the last step always makes one."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay on disk."""


class ResourcesConfig(Section):
    """What the roles take. Resource names and numbers end up in `roles/placement.py` and nowhere else."""

    address: str | None = None
    """A Ray cluster to join (`auto`, `host:port`); without it a local one is started for the run."""
    cluster: Path | None = None
    """The cluster's own config (launcher YAML or KubeRay manifest), which says what it may grow to."""
    pin_roles: bool = False
    """Ask for a seat of the role's own name besides (`rlhf_generator`), which the node groups in `cluster/` declare."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads for each role; 0: all cores, for in a synchronous step one role works at a time."""
    generator_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one generator."""
    learner_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of the learner."""
    scorer_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one scorer."""
    scorers: Count = 1
    """Reward-model actors that share a step's answers."""
    kv_cache_mib: Count = 256
    """Memory for one engine's cache of keys and values."""
    compile_engine: bool = False
    """Let vLLM compile its model: slower to start, faster to sample."""
    start_deadline_s: Positive = 300
    """An actor's imports, model load and engine start."""
    call_deadline_s: Positive = 300
    """One remote call of a step."""
    fit_deadline_s: Positive = 86400
    """A whole supervised fit."""


class Config(Section):
    """Everything a run can be told."""

    recipe: Literal["dialogue", "preferences"] = "dialogue"
    """`dialogue`: an invented world with a gold score; `preferences`: people's choices from `data.path`."""
    method: Literal["rl", "dpo", "ipo", "kto"] = "rl"
    """How the policy is improved: against the reward model, with `ppo` below; or from choices (`dpo`, `ipo`), or from
    what people called good or bad (`kto`), with `direct` below."""
    seed: int = 0
    """What every draw of the run follows from: world, initial weights, prompts, samples."""
    deterministic: bool = False
    """Refuse settings by which two runs of one seed would differ: rollouts shared out by load."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoRAConfig = LoRAConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    direct: DirectConfig = DirectConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="before")
    @classmethod
    def _with_presets(cls, tree: Any) -> Any:
        return with_presets(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _algorithm_is_whole(self) -> "Config":
        ppo, samples = self.ppo, self.rollout.samples
        compares = {
            f"ppo.advantage={ppo.advantage}": ppo.advantage in GROUPED,
            "ppo.whiten=group": ppo.whiten == "group",
            "ppo.reward_norm=group": ppo.reward_norm == "group",
            "rollout.dynamic_sampling": self.rollout.dynamic_sampling > 0,
        }
        for setting in (name for name, needed in compares.items() if needed and samples < 2):
            raise ValueError(f"{setting} compares responses to one prompt: set rollout.samples to 2 or more")
        if ppo.kl.where == "loss" and ppo.kl.estimator == "k1" and ppo.kl.coef:
            raise ValueError("ppo.kl.where=loss needs ppo.kl.estimator=k2 or k3: the gradient of k1 is 0 in the mean")
        if ppo.advantage == "remax" and ppo.reward_norm in ("batch", "group"):
            raise ValueError("ppo.advantage=remax compares rewards of two batches: set ppo.reward_norm=running or none")
        if (
            ppo.critic_from == "reward_model"
            and self.reward_model.path is None
            and self.reward_model.backbone != "decoder"
        ):
            raise ValueError(
                "ppo.critic_from=reward_model needs reward_model.backbone=decoder, which reads the policy's tokens"
            )
        if self.lora.rank and self.method != "rl":
            raise ValueError(f"lora.rank is for method=rl: method={self.method} learns with all weights; leave it out")
        if self.lora.rank and ppo.kl.refresh_every:
            raise ValueError(
                "ppo.kl.refresh_every needs a reference of its own, and with lora it is the policy without lora"
            )
        critics = {"critic_from": "policy", "critic_warmup": 0, "value_norm": False}
        for key, default in critics.items():
            if ppo.advantage != "gae" and getattr(ppo, key) != default:
                raise ValueError(f"ppo.{key} is a critic's, and ppo.advantage={ppo.advantage} has none: leave it out")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        batch = self.rollout.prompts * self.rollout.samples
        if batch % self.ppo.minibatch:
            raise ValueError(
                f"ppo.minibatch={self.ppo.minibatch} does not divide rollout.prompts * rollout.samples = {batch}"
            )
        if self.rollout.max_tokens >= self.model.context:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt "
                f"in model.context={self.model.context}"
            )
        minimum, wanted = self.rollout.min_generators, self.rollout.generators
        if minimum is not None and minimum > wanted:
            raise ValueError(f"rollout.min_generators={minimum} are more than rollout.generators={wanted}")
        if minimum is not None and minimum < wanted and self.deterministic:
            raise ValueError(
                f"rollout.min_generators={minimum} shares rollouts out by load, and deterministic gives each its fixed "
                "generator: leave one of the two out"
            )
        if self.ppo.kl.target is not None and self.ppo.kl.coef == 0:
            raise ValueError("ppo.kl.coef=0 cannot be adapted to ppo.kl.target: give it a value to start from")
        if self.model.hidden % self.model.heads:
            raise ValueError(f"model.heads={self.model.heads} does not divide model.hidden={self.model.hidden}")
        if self.recipe == "preferences" and self.data.path is None:
            raise ValueError("recipe: preferences needs data.path, a file of human choices")
        if self.recipe == "dialogue" and self.data.held_out >= self.data.prompts:
            raise ValueError(f"data.held_out={self.data.held_out} leaves none of data.prompts={self.data.prompts}")
        return self


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a YAML file and `dotted.key=value` overrides, the later winning.

    Raises `ConfigError` with the key at fault, and the nearest known key where one is unknown.
    """
    tree = _read_yaml(path) if path else {}
    if any(override.startswith(("method=", "ppo.advantage=", "ppo.loss=")) for override in overrides):
        _drop_what_came_along(tree)
    apply_overrides(tree, overrides)
    config = parse_section(Config, tree, source=str(path or "(overrides)"))
    if config.run.id is None and path is not None:
        name = "".join(c if c.isalnum() or c in "_-" else "-" for c in path.stem.lower())
        config = config.model_copy(update={"run": config.run.model_copy(update={"id": name})})
    return config


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets each `dotted.key=value` in the tree, the later winning; `ConfigError` for what is none."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{override}' is not of the form dotted.key=value")
        _set(tree, key.split("."), _parse_value(override, value))


def parse_section(section: type[AnySection], tree: Mapping[str, Any], *, source: str) -> AnySection:
    """A section from a mapping; `ConfigError` names its source and the key at fault."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, section, source)) from None


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections included: `ppo`, `ppo.kl`, `ppo.kl.coef`."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{key}.")


def _drop_what_came_along(tree: dict[str, Any]) -> None:
    """Takes from a file's tree what its own algorithm would have brought: a run's config.yaml spells all of it out, and
    another algorithm, named on the command line, brings its own.
    """
    ppo = tree.get("ppo")
    chosen = {key: ppo[key] for key in ("advantage", "loss") if key in ppo} if isinstance(ppo, dict) else {}
    try:
        own = Config.model_validate({"method": tree.get("method", "rl"), "ppo": chosen}).model_dump(mode="json")
    except ValidationError:
        return  # the file's algorithm is refused elsewhere, by name
    for *sections, key in (path.split(".") for path in GOVERNED if path not in ("ppo.advantage", "ppo.loss")):
        there: Any = tree
        brought: Any = own
        for name in sections:
            there, brought = there.get(name) if isinstance(there, dict) else None, brought[name]
        if isinstance(there, dict) and key in there and there[key] == brought[key]:
            del there[key]
    if isinstance(ppo, dict) and ppo.get("loss") == BY_ADVANTAGE[own["ppo"]["advantage"]].get("ppo.loss", "clip"):
        del ppo["loss"]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not keys with values")
    return tree


def _parse_value(override: str, value: str) -> Any:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of override '{override}' is not YAML") from None
    if isinstance(parsed, str):  # YAML reads 1e-4 as text
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{'.'.join(keys[: depth + 1])}' is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def _explain(error: ValidationError, section: type[Section], source: str) -> str:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, list(known_keys(section)), n=1, cutoff=0.0)
            problems.append(f"unknown key '{key}'; nearest known key: '{near[0]}'")
        elif key:
            problems.append(f"{key}: {item['msg'].lower()}, got {item['input']!r}")
        else:
            problems.append(item["msg"].removeprefix("Value error, "))
    return f"config {source}: " + "; ".join(problems)
