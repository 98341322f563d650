"""The learner: it turns rollouts and scores into advantages, and the policy into a better one.

The arithmetic is in `algo/`; `advantage.py` and `objective.py` choose from it by the config, `networks.py` asks the
models. What holds for all: one update of the policy (and of the critic, where there is one) a step, from rollouts whose
log-probs are computed anew here.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from rlhf_ray.algo.batching import minibatches
from rlhf_ray.algo.correction import importance_weights
from rlhf_ray.algo.groups import spread_of
from rlhf_ray.algo.kl import AdaptiveKL, kl_per_token
from rlhf_ray.algo.losses import Totals, masked_mean
from rlhf_ray.algo.schedules import rate_factor
from rlhf_ray.algo.shaping import token_rewards
from rlhf_ray.config import Config
from rlhf_ray.errors import Diverged
from rlhf_ray.models.checkpoint import Checkpoint, prune, save_checkpoint
from rlhf_ray.models.export import as_on_disk, save_streamed
from rlhf_ray.models.logits import plain_of
from rlhf_ray.models.lora import adapter_weights, learnt_weights, load_learnt_weights, plain_weights
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.models.stored import dtypes_of
from rlhf_ray.roles.advantage import AdvantageEstimator, Responses
from rlhf_ray.roles.batch import Batch, Tokens, collate, collate_rollouts
from rlhf_ray.roles.budget import TokenBudget
from rlhf_ray.roles.loading import adopt_policy, load_networks
from rlhf_ray.roles.mismatch import behaviour_of, fresh_of, mismatch
from rlhf_ray.roles.networks import ALONE, Networks
from rlhf_ray.roles.objective import Objective
from rlhf_ray.roles.optimizers import load_moments, make_optimizer, moments_of
from rlhf_ray.roles.ranks import Ranks
from rlhf_ray.roles.saving import BackgroundWriter
from rlhf_ray.transport.parcels import Named, Parcel, Sent
from rlhf_ray.transport.sending import Sender
from rlhf_ray.types import Rollout, Sampling, Scored

BAD_UPDATES_ALLOWED = 3


class Learner:
    """One rank that learns. `weights_step` counts its updates; all methods are deterministic given the seed."""

    def __init__(
        self, networks: Networks, *, config: Config, base: Path, demonstrations: Sequence[tuple[list[int], int]] = ()
    ) -> None:
        """`demonstrations`: token ids of prompt and response, and how many are the prompt's; for `ppo.ptx_coef`."""
        self.networks, self.device, self.ranks = networks, networks.device, networks.ranks
        self.config, self.ppo = config, config.ppo
        self.tokenizer = load_tokenizer(base)
        self.pad_id = int(self.tokenizer.pad_token_id)
        self.demonstrations = [(ids[:prompt], ids[prompt:]) for ids, prompt in demonstrations]
        self.rates = {"policy": self.ppo.learning_rate, "critic": self.ppo.critic_learning_rate}
        self.learning = {"policy": networks.policy} | ({"critic": networks.critic} if networks.critic else {})
        self.optimizers = {
            name: make_optimizer(_learning(model), self.rates[name], bits=config.resources.optimizer_bits)
            for name, model in self.learning.items()
        }
        self.kl = AdaptiveKL(self.ppo.kl.coef, self.ppo.kl.target, self.ppo.kl.horizon)
        self.estimator = AdvantageEstimator(config)
        self.objective = Objective(networks, config)
        self.averaged = _copies(learnt_weights(networks.policy)) if self.ppo.ema is not None else {}
        self.writer = BackgroundWriter(deadline_s=config.resources.call_deadline_s)
        self.stored = dtypes_of(base) if config.lora.rank else {}
        """What an adapter may be sent alone for: the folder's weights."""
        self.weights_step = 0
        self.bad_updates = 0

    @classmethod
    def from_folder(
        cls,
        base: Path,
        config: Config,
        *,
        reward_model: Path | None = None,
        demonstrations: Sequence[tuple[list[int], int]] = (),
        ranks: Ranks = ALONE,
    ) -> Self:
        """A learner at weights step 0: the policy and the reference are the base policy."""
        body = reward_model if config.ppo.critic_from == "reward_model" else base
        sampling = Sampling(config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens)
        networks = load_networks(
            base,
            sampling=sampling,
            budget=TokenBudget(config.resources.learner_tokens, alone=ranks.count == 1),
            critic_body=body if config.ppo.advantage == "gae" else None,
            lora=config.lora,
            seed=config.seed,
            ranks=ranks,
            resources=config.resources,
        )
        return cls(networks, config=config, base=base, demonstrations=demonstrations)

    def prepare(self, sampled: Scored, greedy: Scored | None = None) -> Batch:
        """Turns rollouts and their rewards into advantages, by the policy as it stands.

        `greedy` are ReMax's baselines: the likeliest response to the prompt of each rollout, in the rollouts' order.
        Raises `Diverged` where the KL to the reference has passed `ppo.kl.limit`.
        """
        rollouts, scores = sampled.rollouts, sampled.scores
        assert len(rollouts) == len(scores), "one reward for each rollout"
        tokens = collate_rollouts(rollouts, pad_id=self.pad_id).to(self.device)
        mask, responses = tokens.mask, Responses.of(rollouts, self.device)
        own = self.networks.all_own(tokens)
        logprobs, sampled_logprobs, unsure = own.logprobs, own.sampled, own.unsure  # (B, T) each
        reference_logprobs = self.networks.all_reference_logprobs(tokens)
        kl = kl_per_token(logprobs, reference_logprobs, self.ppo.kl.estimator) * mask  # (B, T)
        kl_response = float(kl.sum(1).mean())
        self._check_kl(kl_response)

        raw = torch.tensor(scores, dtype=torch.float32, device=self.device)  # (B)
        coef = self.kl.coef if self.ppo.kl.where == "reward" else 0.0
        rewards = token_rewards(self.estimator.shape(raw, responses), kl, mask, coef=coef)  # (B, T)
        outputs = self.networks.all_values(tokens) if self.networks.critic else None
        advantages, returns = self.estimator.estimate(
            rewards,
            mask,
            numbers=responses.groups,
            values=None if outputs is None else self.estimator.values_of(outputs),
            baseline=None if greedy is None else self._baseline(greedy),
        )
        if returns is not None and outputs is not None:
            returns, outputs = self.estimator.critic_targets(returns, outputs, mask)

        behaviour = behaviour_of(rollouts, like=sampled_logprobs)
        weights = importance_weights(
            sampled_logprobs,
            torch.where(unsure, sampled_logprobs, behaviour),  # float error is no reason to weigh anything
            mask,
            how=self.ppo.correction,
            low=self.ppo.correction_low,
            high=self.ppo.correction_high,
        )
        metrics = {
            "objective/scores": float(raw.mean()),
            "objective/scores_std": float(raw.std(correction=0)),
            "objective/rlhf_reward": float(rewards.sum(1).mean()),
            "objective/kl": kl_response,
            "objective/kl_coef": self.kl.coef,
            "objective/entropy": float(masked_mean(own.entropy, mask)),
            **mismatch(
                behaviour, sampled_logprobs, unsure, mask, fresh_of(rollouts, self.weights_step, like=behaviour)
            ),
        }
        if self.config.rollout.samples > 1:
            metrics["objective/equal_groups"] = float((spread_of(raw, responses.groups) < 1e-6).float().mean())
        if self.ppo.correction != "none":
            metrics["correction/weight_mean"] = float(masked_mean(weights, mask))
            metrics["correction/left_out"] = float(masked_mean((weights == 0).float(), mask))
        self.kl = self.kl.updated(kl_response, len(rollouts))
        return Batch(tokens, logprobs, reference_logprobs, advantages, weights, outputs, returns, metrics)

    def update(self, batch: Batch) -> dict[str, float]:
        """`ppo.epochs` passes over the batch in minibatches; returns the mean of each statistic over them.

        Ends early where the policy has moved by more than `ppo.kl.update_limit`. A minibatch whose gradient is not
        finite changes nothing and is counted; the third in a row raises `Diverged`.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.weights_step)
        factor = self._set_rates()
        planned = [
            index
            for _ in range(self.ppo.epochs)
            for index in minibatches(len(batch.logprobs), self.ppo.minibatch, generator)
        ]
        history: list[dict[str, Tensor]] = []
        for index in planned:
            history.append(self._learn(batch, index.to(self.device), generator))
            limit = self.ppo.kl.update_limit
            if limit is not None and float(history[-1].get("policy/approxkl_avg", 0.0)) > limit:
                break
        self.weights_step += 1
        self._average_in()
        refresh, reference = self.ppo.kl.refresh_every, self.networks.reference
        if refresh and reference is not None and self.weights_step % refresh == 0:
            reference.load_state_dict(self.networks.policy.state_dict())
        means = {name: float(torch.stack([stats[name] for stats in history]).nanmean()) for name in history[0]}
        finite = means.pop("finite")
        skipped = round(len(history) * (1 - finite))
        return {
            **means,
            "lr": factor * self.ppo.learning_rate,
            "learn/skipped_updates": float(skipped),
            "learn/out_of_memory": float(self.networks.budget.halved),
            "learn/packed": float(self.networks.packed),
            "learn/left_out": 1 - len(history) / len(planned),
        }

    def push(self, sender: Sender, to: Sequence[str]) -> Generator[Parcel, None, Sent | None]:
        """Sends the policy's weights, as they stand, to the generators of these names: parcels for each of them.

        Under the names that `save_pretrained` writes; of a LoRA policy the adapter alone, where that is enough. All
        ranks have to come along, and only the first one gives.
        """
        policy = self.networks.policy
        adapter = adapter_weights(policy, self.stored)
        weights: Iterable[Named] = self._wholes(adapter if adapter is not None else plain_weights(policy))
        if not self.ranks.first:
            for _ in weights:
                pass
            return None
        if adapter is None:
            weights = as_on_disk(plain_of(policy), weights)
        return (yield from sender.send(weights, to, weights_step=self.weights_step, over_base=adapter is not None))

    @torch.no_grad()
    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probs of each (prompt, response)'s response tokens under the policy as it stands, sampled so."""
        tokens = collate(sequences, pad_id=self.pad_id).to(self.device)
        logprobs = self.networks.say(self.networks.policy, tokens, sampling=sampling).sampled  # (B, T)
        return [row[: len(response)].tolist() for row, (_, response) in zip(logprobs, sequences, strict=True)]

    def mean_kl(self, rollouts: Sequence[Rollout]) -> float:
        """KL to the reference in nats a response, estimated on rollouts of the policy as it stands."""
        tokens = collate_rollouts(rollouts, pad_id=self.pad_id).to(self.device)
        logprobs, reference = self.networks.all_own(tokens).logprobs, self.networks.all_reference_logprobs(tokens)
        return float((kl_per_token(logprobs, reference, self.ppo.kl.estimator) * tokens.mask).sum(1).mean())

    def save(self, folder: Path, step: int, *, best: int | None = None) -> str | None:
        """Begins a checkpoint of everything that decides the rest of the run; returns once it is copied.

        It holds whole tensors, written by the first rank, so any number of ranks can go on from it. `best`: the step
        that the checkpoint before it is kept for, besides the newest. Returns why the disk refused the one before.
        """
        tensors = {name: self._copied(learnt_weights(model)) for name, model in self.learning.items()}
        if self.ppo.kl.refresh_every and self.networks.reference is not None:
            tensors["reference"] = self._copied(self.networks.reference.state_dict())
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer_{name}"] = self._copied(moments_of(optimizer))
        if self.averaged:
            tensors["averaged"] = self._copied(self.averaged)
        if not self.ranks.first:
            return None
        state = {
            "weights_step": self.weights_step,
            "bad_updates": self.bad_updates,
            "kl": asdict(self.kl),
            "estimator": self.estimator.state(),
        }
        keep = self.config.checkpoint.keep

        def write() -> None:
            save_checkpoint(folder, step, tensors=tensors, state=state)
            prune(folder, keep, best=best)

        return self.writer.begin(write)

    def finish_saving(self) -> str | None:
        """Returns once the last checkpoint is on the disk; why the disk refused it, if it did."""
        return self.writer.finish()

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        for name, model in self.learning.items():
            load_learnt_weights(model, self._shards(learnt_weights(model), checkpoint.tensors[name]))
        reference = self.networks.reference
        if self.ppo.kl.refresh_every and reference is not None:
            reference.load_state_dict(self._shards(reference.state_dict(), checkpoint.tensors["reference"]))
        for name, optimizer in self.optimizers.items():
            load_moments(optimizer, checkpoint.tensors.get(f"optimizer_{name}", {}), self.ranks)
        if self.averaged:
            self.averaged = _copies(self._shards(self.averaged, checkpoint.tensors["averaged"]))  # changed in place
        state = checkpoint.state
        self.weights_step, self.bad_updates = state["weights_step"], state["bad_updates"]
        self.kl = AdaptiveKL(**state["kl"])
        self.estimator.load(state["estimator"])

    def save_policy(self, folder: Path) -> None:
        """The policy as a plain Hugging Face folder; the first rank's work."""
        weights = self._wholes(plain_weights(self.networks.policy))
        try:
            if self.ranks.first:
                save_streamed(folder, plain_of(self.networks.policy), weights, self.tokenizer)
        finally:  # every rank gives its shards of each, whatever became of the first one's folder
            for _ in weights:
                pass

    def adopt(self, folder: Path) -> None:
        """The policy of a folder in place of this one, as one step of learning; nothing is learnt after it."""
        adopt_policy(self.networks, folder)
        self.learning = {}
        self.weights_step += 1

    def take_average(self) -> None:
        """The average of all steps' weights in place of the last one's, as one step more (`ppo.ema`)."""
        assert self.averaged, "ppo.ema is not set"
        load_learnt_weights(self.networks.policy, self.averaged)
        self.weights_step += 1

    def _set_rates(self) -> float:
        """For the update that comes; the factor."""
        ppo = self.ppo
        factor = rate_factor(self.weights_step, steps=ppo.steps, warmup=ppo.warmup, schedule=ppo.schedule)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * self.rates[name]
        return factor

    @torch.no_grad()
    def _average_in(self) -> None:
        """Exponential moving average of the weights: Polyak and Juditsky 1992, with a fixed decay."""
        for name, weight in learnt_weights(self.networks.policy).items() if self.averaged else ():
            self.averaged[name].lerp_(weight, 1 - (self.ppo.ema or 0.0))

    def _check_kl(self, kl: float) -> None:
        if not kl <= self.ppo.kl.limit:  # NaN fails this too
            raise Diverged(
                f"KL to the reference is {kl:.2f} nats a response at weights step {self.weights_step}, above "
                f"ppo.kl.limit={self.ppo.kl.limit}; raise ppo.kl.coef, set ppo.kl.target or lower ppo.learning_rate"
            )

    def _baseline(self, greedy: Scored) -> Tensor:
        scores = torch.tensor(greedy.scores, dtype=torch.float32, device=self.device)
        return self.estimator.shape_baseline(scores, Responses.of(greedy.rollouts, self.device))

    def _learn(self, batch: Batch, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One optimizer step; scalars to be averaged over the update."""
        policy_learns = self.weights_step >= self.ppo.critic_warmup
        drawn = self._draw(len(index), generator) if self.ppo.ptx_coef and policy_learns else None
        stats = self.networks.budget.spend(
            lambda max_tokens: self._follow(batch, index, drawn, policy_learns=policy_learns, max_tokens=max_tokens),
            all_of_it=batch.tokens.attention[index].numel(),
        )
        norms, finite = self._step(stats.pop("loss"))
        return stats | {"learn/grad_norm": norms["policy"], "finite": torch.tensor(float(finite))}

    def _follow(
        self, batch: Batch, index: Tensor, drawn: Tokens | None, *, policy_learns: bool, max_tokens: int
    ) -> dict[str, Tensor]:
        """The gradient of a minibatch, summed over parts of at most so many tokens; `loss` and the statistics.

        Every rank has parts of its own, as many as the others.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        stats: dict[str, Tensor] = {}

        def add(share: float, loss: Tensor, told: dict[str, Tensor]) -> None:
            (loss * share * self.ranks.count).backward()  # FSDP takes the mean over the ranks
            for name, value in {**told, "loss": loss}.items():
                stats[name] = stats.get(name, torch.zeros_like(value)) + share * value.detach()

        totals = Totals.of(batch.tokens.mask[index])
        for rows, share in self._parts(batch.tokens.attention[index], max_tokens):
            part = batch.rows(index[rows])
            for loss, told in self.objective.of(part, totals, kl_coef=self.kl.coef, policy_learns=policy_learns):
                add(share, loss, told)
        if drawn is not None:
            totals = Totals.of(drawn.mask)
            for rows, share in self._parts(drawn.attention, max_tokens):
                add(share, *self.objective.on_demonstrations(drawn.rows(rows), totals))
        return dict(zip(stats, self.ranks.sum(torch.stack(list(stats.values()))), strict=True))

    def _step(self, loss: Tensor) -> tuple[dict[str, Tensor], bool]:
        """Follows the gradient where it is finite; its norm by network before clipping."""
        norms = {
            name: nn.utils.clip_grad_norm_(_learning(model), self.ppo.max_grad_norm)
            for name, model in self.learning.items()
        }
        norms = {name: self.ranks.whole(norm) for name, norm in norms.items()}
        finite = bool(torch.isfinite(loss) and all(torch.isfinite(norm) for norm in norms.values()))
        if finite:
            for optimizer in self.optimizers.values():
                optimizer.step()
        self.bad_updates = 0 if finite else self.bad_updates + 1
        if self.bad_updates >= BAD_UPDATES_ALLOWED:
            raise Diverged(
                f"{self.bad_updates} updates in a row had a loss or gradient that is not finite, last at weights step "
                f"{self.weights_step}; lower ppo.learning_rate, or look for extreme rewards"
            )
        return norms, finite

    def _parts(self, attention: Tensor, max_tokens: int) -> Iterator[tuple[Tensor, float]]:
        """This rank's row numbers of a (B, L) mask, in parts of like lengths; one that counts 0 keeps it in step."""
        for part in self.networks.dealt(attention.sum(1).tolist(), max_tokens):
            yield torch.tensor(part or [0], device=attention.device), float(bool(part))

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each put together from its shards, on the first rank, and copied to the CPU: the next step changes it."""
        return {name: whole.detach().to("cpu", copy=True) for name, whole in self._wholes(tensors.items())}

    def _wholes(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """One after the other; all ranks have to come along, and only the first one gets them."""
        for name, tensor in tensors:
            whole = self.ranks.whole(tensor)
            if self.ranks.first:
                yield name, whole

    def _shards(self, like: Mapping[str, Tensor], wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of whole tensors."""
        return {name: self.ranks.like(like[name], whole) for name, whole in wholes.items()}

    def _draw(self, n: int, generator: torch.Generator) -> Tokens:
        """n demonstrations."""
        assert self.demonstrations, "ppo.ptx_coef needs demonstrations"
        drawn = torch.randint(len(self.demonstrations), (n,), generator=generator).tolist()
        return collate([self.demonstrations[i] for i in drawn], pad_id=self.pad_id).to(self.device)


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
