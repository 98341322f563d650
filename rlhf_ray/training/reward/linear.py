"""The linear reward model: R(y) = w . y + b on features of a body that stays as it is."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ray.algo.regression import descend, ridge
from rlhf_ray.config import RewardModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.training.fit import Batch, FitResult
from rlhf_ray.training.reward.objective import RATING_NOISE, Judged, RewardNetwork, judgements_of, nats

LINKS = ("tie", "threshold", "offset", "log_slope")


def fit_linear(
    reward_model: RewardModel, items: Sequence[Judged], *, validation: Sequence[Judged], config: RewardModelConfig
) -> FitResult:
    """Gives the model's head the weights at which the summed loss and penalty * |w|^2 are least.

    In closed form (`ridge`), which is for ratings, or by L-BFGS; both see features of mean 0 and variance 1.
    """
    if not items or not validation:
        raise DataError(f"{len(items)} prompts to train on and {len(validation)} to validate; it needs both")
    began = time.monotonic()
    features = reward_model.features([text for item in items for text in item.texts]).double()
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    batch = judgements_of(items, dtype=torch.float64)
    rows = (features - mean) / std
    solve = _by_ridge if config.linear.solver == "ridge" else _by_descent
    weight, bias, links = solve(rows, batch, config)
    head = reward_model.head
    with torch.no_grad():
        head.weight.copy_(weight / std)
        if head.bias is not None:
            head.bias.copy_(bias - (weight / std) @ mean)
    seen = (reward_model.features([text for item in validation for text in item.texts]).double() - mean) / std
    outer = judgements_of(validation, dtype=torch.float64)
    loss = float(nats(seen @ weight.T + bias, outer, links, config) / outer["prompt_terms"].sum())
    seconds = time.monotonic() - began
    tokens = sum(len(text) for item in items for text in item.texts)
    return FitResult(curve=[], validation_loss=loss, steps=0, flat=True, seconds=seconds, tokens_per_s=tokens / seconds)


def _by_ridge(rows: Tensor, batch: Batch, config: RewardModelConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Each aspect's ratings by themselves; an aspect that nobody rated says 0."""
    row, aspect = batch["ratings"].T
    weight, bias = torch.zeros(len(config.aspects), rows.shape[1]).double(), torch.zeros(len(config.aspects)).double()
    for number in aspect.unique().tolist():
        here = aspect == number
        weight[number], bias[number] = ridge(
            rows[row[here]],
            batch["targets"][here],
            batch["rating_weight"][here] / (2 * RATING_NOISE),  # as the loss has it
            penalty=config.linear.penalty,
        )
    return weight, bias, _no_links(config)


def _by_descent(rows: Tensor, batch: Batch, config: RewardModelConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    line = Line(rows.shape[1], config)
    return line.parts(line.descend(rows, batch))


class Line:
    """The line's unknowns as one vector: weights and bias of each aspect, and the links that are learnt."""

    def __init__(self, width: int, config: RewardModelConfig) -> None:
        """width: of the features."""
        self._config, self._width, self._aspects = config, width, len(config.aspects)
        self._fixed = _no_links(config)
        self._learnt = [name for name in LINKS if config.feedback == "joint" or name in ("tie", "threshold")]
        self._sizes = [self._aspects * width, self._aspects, *(self._fixed[name].numel() for name in self._learnt)]

    def descend(self, rows: Tensor, batch: Batch, *, start: Tensor | None = None, steps: int = 2000) -> Tensor:
        """Where loss and penalty are least, or as near as so many steps come."""
        start = torch.zeros(sum(self._sizes), dtype=torch.float64) if start is None else start
        return descend(lambda x: self.loss(x, rows, batch) + self.penalty(x), start, steps=steps)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights (A, width), biases (A) and links."""
        weight, bias, *links = x.split(self._sizes)
        named = {name: link.reshape(self._fixed[name].shape) for name, link in zip(self._learnt, links, strict=True)}
        return weight.view(self._aspects, self._width), bias, {**self._fixed, **named}

    def heads(self, x: Tensor, rows: Tensor) -> Tensor:
        """(B, A) of features (B, width)."""
        weight, bias, _ = self.parts(x)
        return rows @ weight.T + bias

    def loss(self, x: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        """Nats summed over the batch's judgements of the rows."""
        return nats(self.heads(x, rows), batch, self.parts(x)[2], self._config)

    def penalty(self, x: Tensor) -> Tensor:
        """What weights cost; and a little on what no judgement may speak of, or there would be no lowest place."""
        free = x[self._sizes[0] :]
        return self._config.linear.penalty * x[: self._sizes[0]].square().sum() + 1e-3 * free.square().sum()


def _no_links(config: RewardModelConfig) -> dict[str, Tensor]:
    with torch.no_grad():
        links = RewardNetwork(torch.nn.Identity(), config).links
        return {name: parameter.detach().double() for name, parameter in links.items()}
