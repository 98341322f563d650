"""Faults planted between learner and generator, with real vLLM: each is caught every time, before it samples."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from rlhf_ray.errors import InfrastructureError, WeightsMismatch
from rlhf_ray.models.policy import load_tokenizer, new_policy, save_policy, train_tokenizer
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.groups import LearnerGroup, Pushed
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import Placement
from rlhf_ray.roles.vllm_engine import VllmEngine
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.object_store import ObjectStore
from rlhf_ray.transport.parcels import Parcel, Receiver, Sent
from rlhf_ray.transport.sending import Sender
from rlhf_ray.types import GenerationRequest, Sampling, Scored, WeightsReceipt

pytestmark = [pytest.mark.ray, pytest.mark.timeout(800)]
WORDS = "the blue lamp arrived broken,hello there my friend,where is my red chair,it has not come"
TRIALS = [pytest.param(1, id="once"), pytest.param(20, id="20 times", marks=pytest.mark.slow)]
Weights = dict[str, Tensor]


class Engine(VllmEngine):
    """The real one, which does what a file says instead of loading."""

    def __init__(self, model: Path, *, fault: Path, **options: int) -> None:
        super().__init__(model, **options)
        self.fault, self.reset = fault, self.engine.reset_prefix_cache

    def load(self, parcel: Parcel, receiver: str) -> str | None:
        fault = self.fault.read_text() if self.fault.exists() else ""
        self.engine.reset_prefix_cache = (lambda **_: True) if fault == "keep the cache" else self.reset
        if fault != "load nothing":
            return super().load(parcel, receiver)
        intake = Intake(Receiver(receiver))
        intake.take(parcel)
        return intake.sha256() if parcel.last else None


class DrawnLearner(Learner):
    """A learner each of whose updates draws other weights, as far from the first ones as the last."""

    def update(self, _: object) -> dict[str, float]:
        draw = torch.Generator().manual_seed(self.weights_step)
        if not self.weights_step:
            self.first = {name: tensor.clone() for name, tensor in self.networks.policy.state_dict().items()}
        with torch.no_grad():
            for name, parameter in self.networks.policy.named_parameters():
                parameter.copy_(self.first[name] + 0.05 * torch.randn(parameter.shape, generator=draw))
        self.weights_step += 1
        return {"weights_step": float(self.weights_step)}

    def prepare(self, *_: object) -> Any:
        class Nothing:
            metrics: dict[str, float] = {}  # noqa: RUF012

        return Nothing


@pytest.fixture(scope="module")
def folder(placement: Placement, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "policy"
    tokenizer = train_tokenizer(WORDS.split(","), vocabulary=512, context=256)
    save_policy(path, new_policy(placement.config.model, tokenizer, seed=1), tokenizer)
    return path


@pytest.fixture(scope="module")
def roles(placement: Placement, folder: Path) -> Iterator[tuple[GeneratorGroup, LearnerGroup]]:
    engine = partial(Engine, folder, fault=folder / "fault", context=256, kv_cache_mib=64)
    generators = placement.start_generators(folder, weights_step=0, make_engine=engine)
    learner = placement.start_learner(partial(DrawnLearner.from_folder, folder, placement.config))
    placement.wait_ready()
    yield generators, learner
    placement.stop_actors()


class Local:
    """Parcels of this process, in place of those that the learner pushed; what it says it sent stays."""

    def __init__(self, parcels: Iterable[Parcel], sent: Sent) -> None:
        self.parcels, self.sent = parcels, sent

    def __iter__(self) -> Iterator[Parcel]:
        return iter(self.parcels)


class Planted:
    """The generators, to which other weights are given than were pushed, with the receipts of the right ones."""

    def __init__(self, generators: GeneratorGroup, change: Callable[[Weights], Weights]) -> None:
        self.generators, self.change = generators, change
        self.names, self.answering = generators.names, generators.answering
        self.probe, self.release, self.retire = generators.probe, generators.release, generators.retire

    def load_weights(self, pushed: Pushed) -> dict[str, WeightsReceipt]:
        return self.load_changed([ray.get(parcel) for parcel in pushed], pushed.sent)

    def load_changed(self, parcels: list[Parcel], sent: Sent) -> dict[str, WeightsReceipt]:
        intake, weights = Intake(Receiver("here")), dict[str, Tensor]()
        for parcel in parcels:
            weights.update(intake.take(parcel))
        changed = Sender(ObjectStore()).send(self.change(weights).items(), [], weights_step=sent.weights_step)
        receipts = self.generators.load_weights(Local(changed, sent))
        return {name: replace(receipt, sha256=sent.sha256) for name, receipt in receipts.items()}


class Cut(Planted):
    """The generators, which get the first half of what was pushed."""

    def __init__(self, generators: GeneratorGroup) -> None:
        super().__init__(generators, dict)

    def load_changed(self, parcels: list[Parcel], sent: Sent) -> dict[str, WeightsReceipt]:
        pieces = [[flat.copy() for flat in parcel.contents] for parcel in parcels]
        for flat in (flat for contents in pieces for flat in contents[len(contents) // 2 :]):
            flat[:] = 0
        cut = [parcel._replace(contents=contents) for parcel, contents in zip(parcels, pieces, strict=True)]
        return self.generators.load_weights(Local(cut, sent))


class LaterChanged(Planted):
    """The generators, one layer of which changes by a hundredth once the right weights are loaded."""

    def load_changed(self, parcels: list[Parcel], sent: Sent) -> dict[str, WeightsReceipt]:
        receipts = self.generators.load_weights(Local(parcels, sent))
        super().load_changed(parcels, sent)
        return receipts


def one_tensor(draw: Random, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    def changed(weights: Weights) -> Weights:
        # embedding and head are one tensor in the engine, and what is sent last, the head, is what it holds
        tied = "model.embed_tokens.weight"
        name = draw.choice(sorted(name for name in weights if weights[name].dim() > 1 and name != tied))
        return {**weights, name: change(weights[name])}

    return changed


def without_a_layer(draw: Random) -> Callable[[Weights], Weights]:
    layer = f".layers.{draw.randrange(2)}."
    return lambda weights: {name: tensor for name, tensor in weights.items() if layer not in name}


def without_the_head(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def a_little(tensor: Tensor) -> Tensor:
    return tensor + 0.01 * tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))


FAULTS: dict[str, Callable[[GeneratorGroup, Random], Any]] = {
    "a flipped tensor": lambda group, draw: Planted(group, one_tensor(draw, torch.neg)),
    "a skipped layer": lambda group, draw: Planted(group, without_a_layer(draw)),
    "a layer changed after load": lambda group, draw: LaterChanged(group, one_tensor(draw, a_little)),
    "a tied head not sent": lambda group, _: Planted(group, without_the_head),
    "a transfer cut off half-way": lambda group, _: Cut(group),
}


def next_step(learner: LearnerGroup) -> int:
    learner.prepare(Scored([], []))
    return int(learner.update()["weights_step"])


def check_refused(generators: GeneratorGroup) -> None:
    with pytest.raises(InfrastructureError, match="must not sample"):
        generators.generate([GenerationRequest("r", "p", (7, 8), seed=0)], Sampling())


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_learners_are_caught_each_time(
    roles: tuple[GeneratorGroup, LearnerGroup], folder: Path, fault: str, trials: int
) -> None:
    generators, learner = roles
    tokens = len(load_tokenizer(folder))
    for trial in range(trials):
        planted = FAULTS[fault](generators, Random(trial))
        handoff = WeightsHandoff(learner, planted, vocabulary=tokens, context=256)
        with pytest.raises(WeightsMismatch):
            handoff.publish(next_step(learner))
        check_refused(generators)
    honest = WeightsHandoff(learner, generators, vocabulary=tokens, context=256)
    assert honest.publish(next_step(learner))["sync/probe_max_abs"] < 1e-4


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("fault", ["keep the cache", "load nothing"])
def test_an_engine_that_answers_from_the_step_before_is_caught_each_time(
    roles: tuple[GeneratorGroup, LearnerGroup], folder: Path, fault: str, trials: int
) -> None:
    generators, learner = roles
    handoff = WeightsHandoff(learner, generators, vocabulary=len(load_tokenizer(folder)), context=256)
    for _ in range(trials):
        handoff.publish(next_step(learner))  # whose probes fill the cache
        (folder / "fault").write_text(fault)
        try:
            with pytest.raises(WeightsMismatch):
                handoff.publish(next_step(learner))
            check_refused(generators)
        finally:
            (folder / "fault").unlink()
    handoff.publish(next_step(learner))
