"""Supervised fits on transformers' Trainer that end when the validation loss is flat.

Trainer drives (devices, epochs, clipping, optimizer steps). What a small model would feel of it is turned off: logging
and NaN filtering, which read a number from the device at each step, counting FLOPs, and its own evaluation, which
weighs batches and not tokens.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rlhf_ray.algo.batching import by_length
from rlhf_ray.config import FitConfig
from rlhf_ray.errors import DataError, Diverged
from rlhf_ray.models.folder import quiet_transformers
from rlhf_ray.training.schedule import LengthGrouped, Pace

Item = TypeVar("Item")
Learned = TypeVar("Learned", contravariant=True)
Batch = dict[str, Tensor]

VALIDATION_TOKENS = 8192
"""Padded tokens in one forward pass that measures."""
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)


class Objective(Protocol[Learned]):
    """What is learned from items of one kind."""

    def length(self, item: Learned) -> int:
        """Tokens of its longest row; items of like lengths are batched."""

    def collate(self, items: Sequence[Learned]) -> Batch:
        """The tensors of a batch."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
        """The loss summed over a batch, a scalar, and over how many terms."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a fit went."""

    curve: list[dict[str, float]]
    """One look each: `step`, `train_loss` (mean since the last look), `val_loss`."""
    validation_loss: float
    """The lowest one; the model has the weights it was measured with."""
    steps: int
    """Optimizer steps made."""
    flat: bool
    """Whether the validation loss had stopped falling, rather than the epochs being used up."""
    seconds: float
    tokens_per_s: float
    """Tokens trained on a second, padding and looks included in the time and not in the tokens."""


def fit(
    model: PreTrainedModel,
    objective: Objective[Item],
    items: Sequence[Item],
    *,
    validation: Sequence[Item],
    config: FitConfig,
    seed: int,
    stage: str,
    progress: Callable[[str], None],
) -> FitResult:
    """Trains `model` in place until its validation loss is flat and leaves it with the best weights seen.

    The learning rate warms up and stays (a cosine would have to know beforehand when the loss will be flat). Once it
    is flat, or the last epoch nears its end, training goes back to the best weights and the rate falls linearly to
    zero, which takes the noise of the large steps out of them. Raises `Diverged` where the loss is not finite.
    """
    if not items or not validation:
        raise DataError(f"{stage} has {len(items)} rows to train on and {len(validation)} to validate; it needs both")
    use_cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    steps = max(1, math.ceil(config.max_epochs * math.ceil(len(items) / config.batch_size)))
    pace = Pace(steps, config.eval_every, config.tail)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(), quiet_transformers():
        optimizer = _optimizer(model, config)
        looks = _Looks(model, objective, validation, config=config, pace=pace, stage=stage, progress=progress)
        trainer = _Trainer(
            model=model,
            args=_arguments(scratch, steps, config, seed),
            data_collator=objective.collate,
            train_dataset=list(items),
            callbacks=[looks],
            optimizers=(optimizer, LambdaLR(optimizer, pace.factor)),
        )
        trainer.objective, trainer.looks = objective, looks
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    looks.restore_best()
    if use_cache is not None:
        model.config.use_cache = use_cache  # Trainer turns it off, for good
    model.eval()
    model.zero_grad(set_to_none=True)
    seconds = time.monotonic() - start
    trained = looks.curve[-1]["step"] * config.batch_size / len(items) * sum(map(objective.length, items))
    return FitResult(
        curve=looks.curve,
        validation_loss=looks.best,
        steps=int(looks.curve[-1]["step"]),
        flat=looks.flat,
        seconds=seconds,
        tokens_per_s=trained / seconds,
    )


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, objective: Objective[Item], items: Sequence[Item]) -> float:
    """The loss a term (token, pair) over all items, whatever the batches."""
    model.eval()
    total, count = 0.0, 0
    for rows in by_length([objective.length(item) for item in items], max_tokens=VALIDATION_TOKENS):
        batch = objective.collate([items[row] for row in rows])
        loss, terms = objective.loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        total, count = total + loss.item(), count + terms
    return total / max(count, 1)


class _Trainer(Trainer):  # type: ignore[misc]
    """Trainer with our loss and our order of batches."""

    objective: Any
    looks: "_Looks[Any]"

    def compute_loss(self, model: PreTrainedModel, inputs: Batch, *_: Any, **__: Any) -> Tensor:
        total, terms = self.objective.loss(model, inputs)
        loss: Tensor = total / max(terms, 1)
        self.looks.since_last.append(loss.detach())
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> None:
        return None

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> LengthGrouped:
        lengths = [self.objective.length(item) for item in self.train_dataset]
        return LengthGrouped(lengths, self.args.per_device_train_batch_size, self.args.seed)


class _Looks(TrainerCallback, Generic[Item]):  # type: ignore[misc]
    """Looks at the validation loss, keeps the best weights in memory, and says when to slow down and stop."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective[Item],
        validation: Sequence[Item],
        *,
        config: FitConfig,
        pace: Pace,
        stage: str,
        progress: Callable[[str], None],
    ) -> None:
        self.curve: list[dict[str, float]] = []
        self.since_last: list[Tensor] = []
        self.best, self.flat = math.inf, False
        self._best_weights: dict[str, Tensor] = {}
        self._model, self._objective, self._validation = model, objective, validation
        self._config, self._pace, self._stage, self._progress = config, pace, stage, progress
        self._to_beat, self._without_improvement = math.inf, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, pace = state.global_step, self._pace
        if step % self._config.eval_every and step < pace.end:
            return
        self._look(step)
        if self._without_improvement >= self._config.patience:
            self.flat = True
            if step < pace.tail_start:
                pace.begin_tail(step)
        if step == pace.tail_start:
            self.restore_best()
        control.should_training_stop = step >= pace.end

    def restore_best(self) -> None:
        """Gives the model the weights of the best look."""
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(self._best_weights[name])

    def _look(self, step: int) -> None:
        train_loss = torch.stack(self.since_last).mean().item()
        self.since_last.clear()
        loss = mean_loss(self._model, self._objective, self._validation)
        self._model.train()
        self._progress(f"{self._stage} step {step}/{self._pace.end} loss {train_loss:.3f} val {loss:.3f}")
        if not (math.isfinite(loss) and math.isfinite(train_loss)):
            raise Diverged(
                f"{self._stage}: loss {train_loss}, validation loss {loss} at step {step}; "
                f"lower this fit's learning_rate (now {self._config.learning_rate})"
            )
        self.curve.append({"step": step, "train_loss": train_loss, "val_loss": loss})
        if loss < self.best:
            self.best = loss
            self._best_weights = {n: t.detach().to("cpu", copy=True) for n, t in self._model.state_dict().items()}
        if loss < self._to_beat - self._config.min_improvement:
            self._to_beat, self._without_improvement = loss, 0
        else:
            self._without_improvement += 1


def _optimizer(model: PreTrainedModel, config: FitConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]  # norms and biases do not decay
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)


def _arguments(scratch: str, steps: int, config: FitConfig, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        max_grad_norm=MAX_GRAD_NORM,
        seed=seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
