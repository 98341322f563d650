"""The tree itself, and how it is read and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from rlhf_ray.config.fits import DirectConfig, PretrainConfig, SFTConfig
from rlhf_ray.config.lora import LoRAConfig
from rlhf_ray.config.ppo import EvaluateConfig, PPOConfig, RolloutConfig
from rlhf_ray.config.presets import BY_ADVANTAGE, GOVERNED, GROUPED, with_presets
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.rewards import RewardsConfig
from rlhf_ray.config.section import Count, Name, Positive, Probability, Section, apply_overrides, parse_section
from rlhf_ray.errors import ConfigError

BFLOAT16_TOLERANCE = 0.1
"""Nats; the least `rollout.tolerance` beside a learner that rounds to 8 bits: 0.07 was measured on a small model."""


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
    """The prompts and the people's feedback that a run reads."""

    path: Path | None = None
    """What people said: JSON Lines, plain or gzip, or Parquet. Only for `recipe: preferences`."""
    format: Literal[
        "hh",
        "preference",
        "implicit",
        "unpaired",
        "feedback",
        "ultrafeedback",
        "helpsteer2",
        "shp",
        "summaries",
        "lmarena",
        "argilla",
        "mqm",
    ] = "hh"
    """How its rows are written, as for `rlhf feedback import`: `hh` as HH-RLHF has them, `preference`: `prompt`,
    `chosen`, `rejected`."""
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


class CheckpointConfig(Section):
    """How often a run can be gone back to."""

    every: Count = 10
    """PPO steps between two checkpoints; the last step always makes one."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay on disk; with `evaluate.every` also the one that leads to the best look."""


class ResourcesConfig(Section):
    """What the roles take. Resource names and numbers end up in `roles/placement.py` and nowhere else."""

    address: str | None = None
    """A Ray cluster to join (`auto`, `host:port`); without it a local one is started for the run."""
    cluster: Path | None = None
    """The cluster's own config (launcher YAML or KubeRay manifest), which says what it may grow to."""
    pin_roles: bool = False
    """Ask for a seat of the role's own name besides (`rlhf_generator`), which the node groups in `cluster/` declare."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads for each role. 0: all cores, for in a synchronous step one role works at a time; half of them where
    `rollout.max_staleness` has generators and learner work side by side."""
    generator_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one generator."""
    learner_ranks: Count = 1
    """Processes that learn together, each with a shard of every network (FSDP) and a share of every minibatch."""
    learner_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one of the learner's ranks."""
    learner_tokens: Count = 8192
    """Tokens, padding included, that go through the learner's networks at once. A minibatch that holds more is learnt
    from in parts, with the same gradient; where memory runs out the parts are halved."""
    learner_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the learner computes in. With bfloat16 the weights that learn, their gradients and the optimizer stay in
    float32. For GPUs: a CPU without bfloat16 of its own is thirty times slower in it."""
    learner_offload: tuple[Literal["optimizer", "reference"], ...] = ()
    """What of the learner lies in the machine's memory and comes to the GPU layer by layer: the weights that learn with
    their optimizer, the reference."""
    optimizer_bits: Literal[32, 8] = 32
    """8: the optimizer's moments take a quarter of their memory (Dettmers et al. 2021); needs the extra `quantised`."""
    recompute: bool = False
    """The learner computes activations again for the gradient rather than keep them: less memory, a third more time."""
    scorer_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one scorer."""
    scorers: Count = 1
    """Reward-model actors that share a step's answers."""
    kv_cache_mib: Count = 256
    """Memory for one engine's cache of keys and values."""
    compile_engine: bool = False
    """Let vLLM compile its model: slower to start, faster to sample."""
    engine_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What an engine computes in; `rollout.tolerance` has to allow for what the shorter ones round."""
    engine_quantisation: Literal["none", "fp8"] = "none"
    """`fp8`: an engine rounds the weights that it is given to 8 bits, for faster sampling on GPUs that have them. The
    learner then sees rollouts of a slightly other policy: set `ppo.correction`."""
    engine_tensor_parallel: Count = 1
    """GPUs among which each layer of one engine is divided; `generator_gpus` counts them all."""
    engine_pipeline_parallel: Count = 1
    """Groups of GPUs among which one engine's layers are dealt out; `generator_gpus` counts them all."""
    engine_sleep: bool = False
    """Engines give their GPU memory up while the learner learns, so that both may fill the same GPU."""
    weights_transport: Literal["object_store", "gloo", "nccl", "cuda_ipc"] = "object_store"
    """How the learner's weights reach the generators: by Ray's object store; by a broadcast to all at once, over the
    network (`gloo`) or from GPU to GPU (`nccl`); or, where both share one GPU, in its memory (`cuda_ipc`)."""
    start_deadline_s: Positive = 300
    """An actor's imports, model load and engine start."""
    call_deadline_s: Positive = 300
    """One remote call of a step."""
    fit_deadline_s: Positive = 86400
    """A whole supervised fit."""


class Config(Section):
    """Everything a run can be told."""

    recipe: Literal["dialogue", "preferences"] = "dialogue"
    """`dialogue`: an invented world with a gold score; `preferences`: what people said, from `data.path`."""
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
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def imitates_judged_answers(self) -> bool:
        """Whether the base policy has imitated the answers that people liked, those that are held out to measure a
        reward model among them: one that started as its body would know some of what it is asked.
        """
        return self.recipe == "preferences" and self.sft.max_epochs > 0

    @property
    def needs_reward_model(self) -> bool:
        """Whether anything reads a reward model of the run's own."""
        return (
            self.method != "rl"
            or self.rewards.own_model
            or self.ppo.critic_from == "reward_model"
            or self.reward_model.judge
        )

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
        if self.lora.rank and self.resources.learner_ranks > 1:
            raise ValueError("lora.rank is for one rank: leave it out, or set resources.learner_ranks=1")
        if self.lora.rank and ppo.kl.refresh_every:
            raise ValueError(
                "ppo.kl.refresh_every needs a reference of its own, and with lora it is the policy without lora"
            )
        if ppo.ema is not None and self.evaluate.every:
            raise ValueError("ppo.ema averages all steps and evaluate.every takes the best one: leave one of them out")
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
        self._memory_is_saved_where_it_can_be()
        self._engines_can_be_so()
        rewarding = any(source.kind == "environment" for source in self.rewards.sources.values())
        if rewarding and self.rollout.environment is None:
            raise ValueError("rewards.sources has an environment's reward: set rollout.environment")
        if self.rollout.turns > 1 and self.rollout.environment is None:
            raise ValueError(f"rollout.turns={self.rollout.turns} need somebody to talk to: set rollout.environment")
        if self.reward_model.refresh and (self.run.from_ is None or self.run.take == "reward_model"):
            raise ValueError(
                "reward_model.refresh has the policy of another run judged: set run.from, and run.take=feedback"
            )
        self._penalties_know_how_sure_a_reward_is()
        self._steps_may_be_sampled_ahead()
        if self.rollout.environment is not None and self.rollout.stop:
            raise ValueError("rollout.environment answers what ends with the end token: leave rollout.stop out")
        if self.rollout.environment is not None and self.ppo.advantage == "remax":
            raise ValueError("ppo.advantage=remax compares with one greedy answer: leave rollout.environment out")
        for name, service in self.rewards.services().items():
            if service.patience_s >= self.resources.call_deadline_s:
                raise ValueError(
                    f"rewards.sources.{name}.patience_s={service.patience_s:g} has to end before "
                    f"resources.call_deadline_s={self.resources.call_deadline_s:g}"
                )
        if self.ppo.kl.target is not None and self.ppo.kl.coef == 0:
            raise ValueError("ppo.kl.coef=0 cannot be adapted to ppo.kl.target: give it a value to start from")
        if self.model.hidden % self.model.heads:
            raise ValueError(f"model.heads={self.model.heads} does not divide model.hidden={self.model.hidden}")
        if self.recipe == "preferences" and self.data.path is None:
            raise ValueError("recipe: preferences needs data.path, a file of human feedback")
        if self.recipe == "dialogue" and self.data.held_out >= self.data.prompts:
            raise ValueError(f"data.held_out={self.data.held_out} leaves none of data.prompts={self.data.prompts}")
        return self

    def _steps_may_be_sampled_ahead(self) -> None:
        if not self.rollout.max_staleness:
            return
        ahead = f"rollout.max_staleness={self.rollout.max_staleness} samples while the learner learns"
        if self.deterministic:
            raise ValueError(
                f"{ahead}, so what is sampled with which weights is a matter of time: deterministic is not"
            )
        if self.resources.engine_sleep:
            raise ValueError(f"{ahead}, and resources.engine_sleep has engines asleep then: choose one")

    def _engines_can_be_so(self) -> None:
        resources = self.resources
        rounds = resources.engine_dtype != "float32" or resources.engine_quantisation != "none"
        if rounds and self.rollout.tolerance < BFLOAT16_TOLERANCE:
            raise ValueError(
                f"an engine with resources.engine_dtype={resources.engine_dtype} and engine_quantisation="
                f"{resources.engine_quantisation} rounds log-probs by more than rollout.tolerance="
                f"{self.rollout.tolerance:g}: set rollout.tolerance={BFLOAT16_TOLERANCE:g} or more"
            )
        if resources.engine_quantisation != "none" and self.ppo.correction == "none":
            raise ValueError(
                "resources.engine_quantisation samples from another policy than the one that learns: set ppo.correction"
            )
        parts = resources.engine_tensor_parallel * resources.engine_pipeline_parallel
        if parts > 1 and resources.generator_gpus != parts:
            raise ValueError(
                f"an engine on {parts} GPUs (engine_tensor_parallel times engine_pipeline_parallel) needs "
                f"resources.generator_gpus={parts}, not {resources.generator_gpus:g}"
            )
        on_gpus = resources.weights_transport in ("nccl", "cuda_ipc")
        if on_gpus and not (resources.generator_gpus and resources.learner_gpus):
            raise ValueError(
                f"resources.weights_transport={resources.weights_transport} carries weights between GPUs: set "
                "resources.generator_gpus and resources.learner_gpus, or leave it out"
            )
        if resources.weights_transport == "cuda_ipc" and parts * resources.learner_ranks > 1:
            raise ValueError(
                "resources.weights_transport=cuda_ipc is for one learner and engines on the same GPU: leave "
                "engine_tensor_parallel, engine_pipeline_parallel and learner_ranks at 1, or take nccl"
            )
        if (resources.engine_sleep or resources.engine_quantisation != "none") and not resources.generator_gpus:
            raise ValueError("resources.engine_sleep and engine_quantisation are for engines on a GPU: leave them out")

    def _penalties_know_how_sure_a_reward_is(self) -> None:
        ensemble = self.reward_model.ensemble
        for name, source in self.rewards.sources.items():
            if source.kind != "model" or not source.uncertainty or source.paths or self.reward_model.path is not None:
                continue  # a folder says itself whether it has heads
            if ensemble.members < 2 and ensemble.heads < 2:
                raise ValueError(
                    f"rewards.sources.{name}.uncertainty is that of an ensemble: set reward_model.ensemble.heads or "
                    "members to 2 or more"
                )

    def _memory_is_saved_where_it_can_be(self) -> None:
        resources, lora = self.resources, self.lora
        if resources.learner_dtype == "bfloat16" and self.rollout.tolerance < BFLOAT16_TOLERANCE:
            raise ValueError(
                f"resources.learner_dtype=bfloat16 rounds log-probs by more than rollout.tolerance="
                f"{self.rollout.tolerance:g}: set rollout.tolerance={BFLOAT16_TOLERANCE:g} or more"
            )
        if lora.quantised and not lora.rank:
            raise ValueError("lora.quantised keeps weights that do not learn in 4 bits: set lora.rank, or leave it out")
        if lora.rank and resources.learner_offload:
            raise ValueError("resources.learner_offload is for learning with all weights: leave it out with lora.rank")
        if resources.optimizer_bits == 8 and (resources.learner_ranks > 1 or "optimizer" in resources.learner_offload):
            raise ValueError(
                "resources.optimizer_bits=8 is for one rank on its GPU: set resources.learner_ranks=1 and leave "
                "optimizer out of resources.learner_offload, or leave it at 32"
            )


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


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


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
