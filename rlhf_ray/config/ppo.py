"""The loop: how a step samples, what is learnt from it, and how the policy is looked at."""

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.section import Count, Positive, Section

Advantage = Literal["gae", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "rloo", "grpo", "dr_grpo", "remax"]
PolicyLoss = Literal["clip", "dual_clip", "gspo", "cispo", "reinforce"]


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
    stop: tuple[str, ...] = ()
    """Tokens that end a response as its end token does, each as text that is one token: `["\\n"]`."""
    generators: Count = 1
    """vLLM engines, each an actor of its own: so many are wanted, and asked for at once."""
    min_generators: Count | None = None
    """Engines that the run starts with and does not go on without; the others join when their nodes come. By default
    all of them, and then each rollout has its fixed engine."""
    tolerance: Positive = 1e-4
    """Nats by which an engine's log-prob may differ from the learner's for the same weights; float32 holds 1e-4."""
    on_mismatch: Literal["stop", "retire"] = "stop"
    """What becomes of a run whose generator does not hold the weights that it was sent: it stops, or the generator is
    ended and replaced. The third such hand-over in a row stops it all the same."""
    environment: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """What the policy talks to, for dialogues of several turns: `package.module:make`, called with prompt and seed."""
    turns: Count = 1
    """Answers of the policy in one dialogue, at most; `max_tokens` is for each."""
    max_staleness: Annotated[int, Field(ge=0, le=8)] = 0
    """Weights steps that a rollout may lag behind the learner: so many steps ahead are sampled while one is learnt
    from. 0: one after the other. Above 0 each role has its share of the cores, and `ppo.correction` is `token`."""


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
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both rates go over `ppo.steps`, after `warmup`."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """First steps, over which both rates rise."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The run's policy is an average of all steps' weights: so much of what it was, the rest from each new step."""
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
