"""Why a reward model says what it says: whose feedback moved it, of which kind, and where it is wrong.

What judgements are worth is asked of the model's last layer, on what its body reads: by how much the held-out loss
rises, or falls, when it is learnt without them. Of too many parts for that, influence functions say it to first order
(Koh and Liang 2017, arXiv:1703.04730, section 2). A body that would have been another is not part of it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.data.judgements import Comparison, Judgement, counted
from rlhf_ray.errors import InputError
from rlhf_ray.models.ensemble import load_ensemble
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.training.fit import Batch
from rlhf_ray.training.frozen import read_frozen
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.reward.learn import learnable_of
from rlhf_ray.training.reward.linear import Line
from rlhf_ray.training.reward.measure import Scoring, margins_of, told_by
from rlhf_ray.training.reward.objective import judged, judgements_of
from rlhf_ray.training.reward.stage import read_sides
from rlhf_ray.training.run_folder import existing_run
from rlhf_ray.types import Exchange

EXPLAINED = "explained.json"
ANEW = 64
"""Parts of the feedback, at most, without each of which the last layer is learnt anew; of more it is estimated."""
WIDEST = 512
"""Directions of the body's features that are looked at: those in which they vary most."""
FEW = 30
"""Held-out choices of which nothing can be said for sure."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Influence:
    """What a part of the feedback is worth to the rest."""

    name: str
    judgements: int
    helps: float
    """Nats by which the loss of a held-out choice rises without it; below 0 it does harm."""


def explain(run: Path, *, worst: int, say: Say) -> dict[str, Any]:
    """What `rlhf reward explain` shows, which is left in the run's folder for its report too."""
    folder, config = existing_run(run)
    record, frozen = folder.read_json("reward_model.json"), folder.read_json("feedback.json")
    if record is None or frozen is None:
        raise InputError(f"{run} has trained no reward model of its own; run `rlhf reward` on it first")
    if "settings" in record:  # of the run that trained it, which may be another: its split is what counts here
        settings = RewardModelConfig.model_validate(record["settings"])
        config = config.model_copy(update={"seed": record["seed"], "reward_model": settings})
    feedback = read_frozen(folder.store(config), frozen["snapshot"], config=config, say=say)
    train, held_out, reader = read_sides(feedback, config, half=record.get("half"))
    wanted, ensemble = config.reward_model, load_ensemble(folder.reward_model)
    learnt, pairs = learnable_of(train, wanted, seed=config.seed), told_by(held_out, wanted)
    if not pairs:
        raise InputError(
            f"none of the {len(held_out)} judgements that {run} holds out compare two answers: nothing is there to "
            "measure by what each of the others is worth"
        )
    said = ", ".join(f"{n} {kind}" for kind, n in counted(learnt).items())
    say(f"reading {said}, and {len(pairs)} held-out choices")
    question = Question(ensemble.members[0], learnt, pairs, wanted)
    gold = make_recipe(config).gold
    explained = {
        "by_annotator": [_told(part) for part in question.ask(lambda item: item.annotator)],
        "by_kind": [_told(part) for part in question.ask(lambda item: item.kind)],
        "held_out": len(pairs),
        "loss": question.loss,
        "words": [] if reader.words is None else reader.words.loudest(12),
        "mistakes": [
            {**mistake, "gold": [gold(pair.prompt, text) for text in (pair.better, pair.worse)]}
            for pair, mistake in mistakes(ensemble, pairs, worst=worst, logit_scale=record["logit_scale"])
        ],
    }
    folder.write_json(EXPLAINED, explained)
    return explained


class Question:
    """The last layer learnt anew, and what it would be without some of the judgements."""

    def __init__(
        self,
        reward_model: RewardModel,
        train: Sequence[Judgement],
        held_out: Sequence[Comparison],
        config: RewardModelConfig,
    ) -> None:
        self._model, self._train, self._config = reward_model, train, config
        items = judged(reward_model, train, config)
        texts = [text for item in items for text in item.texts]
        features = reward_model.features(texts).double()
        mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
        scaled = (features - mean) / std
        turned = _widest(scaled)
        self._row = {text: number for number, text in enumerate(texts)}
        self._rows = scaled @ turned
        self._line = Line(self._rows.shape[1], config)
        exchanges = [Exchange(pair.prompt, text) for pair in held_out for text in (pair.better, pair.worse)]
        self._seen = (reward_model.features(reward_model.encode(exchanges)).double() - mean) / std @ turned
        self._by_aspect = torch.tensor(list(config.aspects.values()), dtype=torch.float64)
        self._x = self._line.descend(self._rows, judgements_of(items, dtype=torch.float64))
        self.loss = float(self._unseen(self._x))
        """Nats a held-out choice."""

    def ask(self, part: Callable[[Judgement], Hashable]) -> list[Influence]:
        """What each part is worth, the most helpful first."""
        parts: dict[Hashable, list[Judgement]] = {}
        for item in self._train:
            parts.setdefault(part(item), []).append(item)
        worth = self.worth_of if len(parts) <= ANEW else self.estimated_worth_of
        found = [Influence(str(name), len(mine), worth(mine)) for name, mine in parts.items()]
        return sorted(found, key=lambda one: (-one.helps, one.name))

    def worth_of(self, items: Sequence[Judgement]) -> float:
        """Nats by which the held-out loss rises once the last layer is learnt without these."""
        left_out = {id(item) for item in items}
        rows, batch = self._of([item for item in self._train if id(item) not in left_out])
        return float(self._unseen(self._line.descend(rows, batch, start=self._x))) - self.loss

    def estimated_worth_of(self, items: Sequence[Judgement]) -> float:
        """The same for few items, to first order: the held-out loss' gradient . H^-1 . theirs."""
        rows, batch = self._of(items)
        return float(self._direction @ _gradient(lambda x: self._line.loss(x, rows, batch), self._x))

    def _of(self, items: Sequence[Judgement]) -> tuple[Tensor, Batch]:
        """Features of the judged answers, and what was said of them."""
        mine = judged(self._model, items, self._config)
        rows = [self._row[text] for item in mine for text in item.texts]
        return self._rows[rows], judgements_of(mine, dtype=torch.float64)

    @cached_property
    def _direction(self) -> Tensor:
        rows, batch = self._of(self._train)
        curvature: Tensor = torch.autograd.functional.hessian(
            lambda x: self._line.loss(x, rows, batch) + self._line.penalty(x), self._x
        )
        values, vectors = torch.linalg.eigh(curvature)
        gradient = vectors.T @ _gradient(self._unseen, self._x)
        direction: Tensor = vectors @ (gradient / values.clamp(min=1e-6))
        return direction

    def _unseen(self, x: Tensor) -> Tensor:
        """Nats a held-out choice."""
        better, worse = (self._line.heads(x, self._seen) @ self._by_aspect).view(-1, 2).T
        return -torch.nn.functional.logsigmoid(better - worse).mean()


def mistakes(
    reward_model: Scoring, pairs: Sequence[Comparison], *, worst: int, logit_scale: float
) -> list[tuple[Comparison, dict[str, Any]]]:
    """The choices that surprise it most, each with what it would have said, one a prompt."""
    margins = margins_of(reward_model, pairs)
    found: dict[str, tuple[Comparison, dict[str, Any]]] = {}
    for margin, pair in sorted(zip(margins, pairs, strict=True), key=lambda one: one[0]):
        if margin > 0 or len(found) == worst:
            break
        chance = float(torch.sigmoid(torch.tensor(logit_scale * margin)))
        told = {
            "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt.messages],
            "preferred": pair.better,
            "other": pair.worse,
            "kind": pair.kind,
            "margin": margin,
            "probability": chance,
        }
        found.setdefault(pair.prompt.id, (pair, told))
    return list(found.values())


def table(explained: dict[str, Any]) -> list[str]:
    """For a terminal."""
    lines = [f"loss {explained['loss']:.4f} nats on {explained['held_out']} held-out choices; what it would rise by"]
    for title, key in (("without the kind", "by_kind"), ("without the annotator", "by_annotator")):
        lines += [f"{title:<28}{'judgements':>12}{'helps, nats':>14}"]
        lines += [f"  {row['name']:<26}{row['judgements']:>12}{row['helps']:>+14.5f}" for row in explained[key]]
    if explained["words"]:
        words = ", ".join(f"{term} {worth:+.2f}" for term, worth in explained["words"])
        lines.append(f"words that comments are read by: {words}")
    if explained["held_out"] < FEW:
        lines.append("of so few choices that were held out all of this may be luck: raise reward_model.held_out")
    mistakes = len(explained["mistakes"])
    lines.append(f"the {mistakes} worst mistakes are in report.html" if mistakes else "it gets all of them right")
    return lines


def _widest(features: Tensor) -> Tensor:
    """(H, at most `WIDEST`) directions in which features vary most; all of them where they are few."""
    width = features.shape[1]
    if width <= WIDEST:
        return torch.eye(width, dtype=features.dtype)
    vectors: Tensor = torch.linalg.eigh(features.T @ features)[1]
    return vectors[:, -WIDEST:]


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    at = x.detach().clone().requires_grad_()
    [gradient] = torch.autograd.grad(function(at), at)
    return gradient


def _told(part: Influence) -> dict[str, Any]:
    return {"name": part.name, "judgements": part.judgements, "helps": part.helps}
