"""The whole loop in one process, small enough to be killed and resumed many times: the real learner, page, hand-off,
checkpoints and log, around an engine that samples from the weights that it was given.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlhf_ray.config import load_config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.models.checkpoint import Checkpoint
from rlhf_ray.models.policy import load_policy
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.generator import Generator, Sampled
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.loop import resume, train
from rlhf_ray.training.ppo import PPO, Roles, Step
from rlhf_ray.training.run_folder import RunFolder
from rlhf_ray.training.stopping import Stopping
from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.object_store import ObjectStore
from rlhf_ray.transport.parcels import Parcel, Receiver
from rlhf_ray.transport.sending import Sender
from rlhf_ray.types import (
    Exchange,
    FinishReason,
    GenerationRequest,
    Rollout,
    Sampling,
    Scored,
    Scores,
    Span,
    WeightsReceipt,
)
from tests.models.tiny import make_prompt
from tests.roles.fakes import LocalPush

STEPS, EVERY = 4, 2
SETTINGS = [
    "run.id=small", "deterministic=true", "rollout.prompts=4", "rollout.max_tokens=6", "ppo.minibatch=2",
    "ppo.epochs=1", "model.context=48", f"ppo.steps={STEPS}", f"checkpoint.every={EVERY}", "ppo.kl.target=1.0",
    "ppo.kl.limit=1000", "ppo.reward_norm=running", "ppo.value_norm=true", "ppo.schedule=cosine", "ppo.ema=0.9",
    "ppo.ptx_coef=0.1",
]  # fmt: skip
TEXTS = [
    f"{what} {how}" for what in ("my lamp", "my chair") for how in ("broke", "is late", "came broken", "never came")
]


class SamplingEngine:
    """Draws each token from the policy's own distribution, by the request's seed."""

    def __init__(self, base: Path) -> None:
        self.policy = load_policy(base)
        self.end = int(self.policy.config.eos_token_id)
        self.waiting: list[tuple[str, Sequence[int], Sampling, int]] = []
        self.weights_step = -1
        self.intake = Intake(Receiver("one"))

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        self.waiting.append((id, prompt, sampling, seed))

    def step(self) -> list[tuple[str, Sampled]]:
        waiting, self.waiting = self.waiting, []
        return [(id, self.answer(prompt, sampling, seed)) for id, prompt, sampling, seed in waiting]

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def stamp(self, weights_step: int) -> None:
        self.weights_step = weights_step

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Sampled:
        draw, ids, logprobs = torch.Generator().manual_seed(seed), list(prompt), []
        while len(logprobs) < sampling.max_tokens and (not logprobs or ids[-1] != self.end):
            told = self.policy(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(told.exp(), 1, generator=draw)))
            logprobs.append(float(told[ids[-1]]))
        reason: FinishReason = "stop" if ids[-1] == self.end else "length"
        return Sampled(tuple(ids[len(prompt) :]), tuple(logprobs), reason, (Span(0, self.weights_step),))

    def load(self, parcel: Parcel, receiver: str) -> str | None:
        self.policy.load_state_dict(dict(self.intake.take(parcel)))
        return self.intake.sha256() if parcel.last else None


class OneGenerator:
    def __init__(self, base: Path) -> None:
        self.one = Generator(SamplingEngine(base))

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, **_: object) -> list[Rollout]:
        return self.one.generate([replace(request, sampling=sampling) for request in requests]).rollouts

    def names(self) -> list[str]:
        return ["one"]

    answering = names

    def load_weights(self, pushed: LocalPush) -> dict[str, WeightsReceipt]:
        *_, receipt = [self.one.load_weights(parcel) for parcel in pushed]
        assert receipt is not None
        return {"one": receipt}

    def retire(self, name: str, error: Exception) -> None:
        raise error

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        return {"one": self.one.probe(prompts, sampling, seeds=seeds)}

    def release(self, weights_step: int) -> None:
        self.one.release(weights_step)

    def census(self) -> dict[str, float]:
        return {}


class Letters:
    """A scorer that likes the letter e."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        return [self.score_one(exchange) for exchange in exchanges]

    def ask(self, exchanges: Sequence[Exchange]) -> Scores:
        rewards = self.score(exchanges)
        return Scores(rewards, {"letters": rewards}, {}, {})

    def score_one(self, exchange: Exchange) -> float:
        return exchange.response.count("e") - 0.1 * len(exchange.response)


class OneLearner:
    """A learner as its group presents it."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.batch: Batch | None = None

    def prepare(self, sampled: Scored, greedy: Scored | None = None) -> dict[str, float]:
        self.batch = self.learner.prepare(sampled, greedy)
        return self.batch.metrics

    def update(self) -> dict[str, float]:
        assert self.batch is not None
        return self.learner.update(self.batch)

    def push_weights(self, to: Sequence[str]) -> LocalPush:
        return LocalPush(self.learner.push(Sender(ObjectStore()), to))

    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        return self.learner.logprobs_of(sequences, sampling)

    def save(self, folder: Path, step: int, *, best: int | None = None) -> str | None:
        return self.learner.save(folder, step, best=best)

    def finish_saving(self) -> str | None:
        return self.learner.finish_saving()

    def load(self, checkpoint: Checkpoint) -> None:
        self.learner.load(checkpoint)


def run_or_go_on(base: Path, folder: Path) -> None:
    """What the command does with a run folder: from its newest checkpoint to the last step."""
    config = load_config(None, SETTINGS)
    demonstrations = [([10, 11, 12, 13, 14][: 4 + i % 2], 2) for i in range(4)]
    learner = OneLearner(Learner.from_folder(base, config, demonstrations=demonstrations))
    generators = OneGenerator(base)
    tokenizer = learner.learner.tokenizer
    handoff = WeightsHandoff(learner, generators, vocabulary=len(tokenizer), context=48)
    roles = Roles(generators, Letters(), learner, handoff)  # type: ignore[arg-type]
    prompts = PromptStream([make_prompt(text) for text in TEXTS], seed=0)
    ppo = PPO(roles, prompts=prompts, tokenizer=tokenizer, config=config)
    run = RunFolder(folder)
    start = resume(ppo, folder=run, say=print)
    train(ppo, start=start, folder=run, config=config, measure=fingerprint, stopping=Stopping(), say=print)


def fingerprint(done: int, step: Step) -> dict[str, float]:
    """Of the rollouts and of what was scored: any bit of them changes it."""
    return {"test/rollouts": float(zlib.crc32(repr((step.rollouts, step.exchanges)).encode()))}
