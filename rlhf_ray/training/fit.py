"""Supervised fits on transformers' Trainer that end when the validation loss is flat, and go on where they broke off.

Trainer drives (devices, epochs, accumulation, clipping, optimizer steps, checkpoints). What a small model would feel of
it is turned off: NaN filtering and, unless asked for, logging, which read a number from the device at each step,
counting FLOPs, and its own evaluation, which weighs batches and not tokens.
"""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from rlhf_ray.algo.batching import by_length
from rlhf_ray.config import FitConfig
from rlhf_ray.errors import DataError, Diverged
from rlhf_ray.models.folder import quiet_transformers
from rlhf_ray.roles.ranks import rank_and_count
from rlhf_ray.training.schedule import LengthGrouped, Pace
from rlhf_ray.training.trainer import (
    callbacks,
    complete_checkpoint,
    drop_checkpoints,
    newest_checkpoint,
    training_arguments,
)

Item = TypeVar("Item")
Learned = TypeVar("Learned", contravariant=True)
Batch = dict[str, Tensor]

VALIDATION_TOKENS = 8192
"""Padded tokens in one forward pass that measures."""
SAVE_AFTER_S = 60.0
"""A look this long after the last checkpoint makes another one."""


class Objective(Protocol[Learned]):
    """What is learned from items of one kind."""

    def length(self, item: Learned) -> int:
        """Tokens of its longest row; items of like lengths are batched."""

    def collate(self, items: Sequence[Learned]) -> Batch:
        """The tensors of a batch."""

    def terms(self, batch: Batch) -> float:
        """Tokens or judgements whose losses `loss` sums, by what they weigh."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss summed over a batch, a scalar."""


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
    folder: Path | None = None,
) -> FitResult:
    """Trains `model` in place until its validation loss is flat and leaves it with the best weights seen.

    The learning rate warms up and stays (a cosine would have to know beforehand when the loss will be flat). Once it
    is flat, or the last epoch nears its end, training goes back to the best weights and the rate falls linearly to
    zero, which takes the noise of the large steps out of them. With a `lr_scheduler_type` of the user's the rate goes
    by that over all epochs, and a flat loss ends the fit at once.

    `folder` is given checkpoints about every minute and at the end; a fit of the same model, items and settings that
    finds some there goes on from the newest one, to the same weights as if it had never broken off.

    Raises `Diverged` where the loss is not finite.
    """
    if not items or not validation:
        raise DataError(f"{stage} has {len(items)} rows to train on and {len(validation)} to validate; it needs both")
    use_cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(quiet_transformers())
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps = max(1, math.ceil(config.max_epochs * math.ceil(len(items) / config.batch_size)))
        arguments = training_arguments(config, steps=steps, seed=seed, folder=where)
        pace = Pace(steps, config.eval_every, config.tail, scheduled="lr_scheduler_type" in config.trainer)
        looks = _Looks(model, objective, validation, config=config, pace=pace, stage=stage, progress=progress)
        trainer = _Trainer(
            model=model,
            args=arguments,
            data_collator=objective.collate,
            train_dataset=list(items),
            callbacks=[looks, *callbacks(config.callbacks)],
        )
        trainer.objective, trainer.looks, trainer.pace = objective, looks, pace
        trainer.remove_callback(PrinterCallback)
        found = None
        if folder is not None:
            looks.saving = True
            looks.identity = _identity(config, seed, [objective.length(item) for item in items])
            found = newest_checkpoint(folder, looks.identity)
            if found is None:
                drop_checkpoints(folder)  # another fit's, among which Trainer would keep the newest
        if found is not None:
            looks.take_up(found.state, found.best_weights)
            progress(f"{stage} goes on from its checkpoint at step {looks.step}")
        if looks.step < pace.end:
            trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    looks.restore_best()
    if use_cache is not None:
        model.config.use_cache = use_cache  # Trainer turns it off, for good
    model.eval()
    model.zero_grad(set_to_none=True)
    trained = looks.step * config.batch_size / len(items) * sum(map(objective.length, items))
    return FitResult(
        curve=looks.curve,
        validation_loss=looks.best,
        steps=looks.step,
        flat=looks.flat,
        seconds=looks.seconds,
        tokens_per_s=trained / looks.seconds,
    )


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, objective: Objective[Item], items: Sequence[Item]) -> float:
    """The loss a term (token, judgement) over all items, whatever the batches."""
    model.eval()
    total, count = 0.0, 0.0
    index, ranks = rank_and_count()
    batches = list(by_length([objective.length(item) for item in items], max_tokens=VALIDATION_TOKENS))
    for rows in batches[index::ranks]:
        batch = objective.collate([items[row] for row in rows])
        loss = objective.loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        total, count = total + loss.item(), count + objective.terms(batch)
    total, count = _over_ranks(total, count)
    return total / (count or 1)


def _over_ranks(*numbers: float) -> list[float]:
    """The sums of each over the ranks that fit together, on the CPU; on one rank as they are."""
    if rank_and_count()[1] == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    added: list[float] = sums.tolist()
    return added


class _Trainer(Trainer):  # type: ignore[misc]
    """Trainer with our loss, our order of batches and our learning rates."""

    objective: Any
    looks: "_Looks[Any]"
    pace: Pace
    lr_scheduler: Any
    loss_is_scaled_for_ga = True  # by the terms of the whole step, so that accumulation never changes the gradient

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, *_: Any, num_items_in_batch: float | None = None, **__: Any
    ) -> Tensor:
        loss: Tensor = self.objective.loss(model, inputs) / (num_items_in_batch or 1)
        self.looks.since_last.append(loss.detach())
        return loss * rank_and_count()[1]  # gradients are averaged over the ranks, and each has its share of the step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and not self.pace.scheduled:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.pace.factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> float:
        [terms] = _over_ranks(math.fsum(self.objective.terms(batch) for batch in batch_samples))
        return terms

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> LengthGrouped:
        lengths = [self.objective.length(item) for item in self.train_dataset]
        _, ranks = rank_and_count()
        a_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * ranks
        return LengthGrouped(lengths, a_step, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.looks.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class _Looks(TrainerCallback, Generic[Item]):  # type: ignore[misc]
    """Looks at the validation loss, keeps the best weights in memory, and says when to slow down, save and stop."""

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
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.since_last: list[Tensor] = []
        self.best, self.flat = math.inf, False
        self.saving, self.identity = False, ""
        self._best_weights: dict[str, Tensor] = {}
        self._model, self._objective, self._validation = model, objective, validation
        self._config, self._pace, self._stage, self._progress = config, pace, stage, progress
        self._to_beat, self._without_improvement = math.inf, 0
        self._start = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent on this fit, before it broke off, too."""
        return time.monotonic() - self._start

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step, pace = state.global_step, self._pace
        if self.step % self._config.eval_every == 0 or self.step >= pace.end:
            self._look()
            if self._without_improvement >= self._config.patience:
                self.flat = True
                pace.turn_flat(self.step)
            if self.step == pace.tail_start:
                self.restore_best()
            control.should_training_stop = self.step >= pace.end
        due = time.monotonic() - self._saved >= SAVE_AFTER_S or control.should_training_stop
        control.should_save = control.should_save or (self.saving and bool(_over_ranks(due)[0]))

    def restore_best(self) -> None:
        """Gives the model the weights of the best look."""
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(self._best_weights[name])

    def save(self, checkpoint: Path) -> None:
        """Adds to Trainer's own checkpoint what `take_up` goes on from."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "since_last": [loss.item() for loss in self.since_last],
            "flat": self.flat,
            "best": self.best,
            "to_beat": self._to_beat,
            "without_improvement": self._without_improvement,
            "tail_start": self._pace.tail_start,
            "end": self._pace.end,
        }
        complete_checkpoint(checkpoint, state, self._best_weights)
        self._saved = time.monotonic()

    def take_up(self, state: dict[str, Any], best_weights: dict[str, Tensor]) -> None:
        """Goes on where `save` was called."""
        self.step, self.curve, self.flat, self.best = (state[name] for name in ("step", "curve", "flat", "best"))
        self.since_last = [torch.tensor(loss, device=self._model.device) for loss in state["since_last"]]
        self._to_beat, self._without_improvement = state["to_beat"], state["without_improvement"]
        self._pace.tail_start, self._pace.end = state["tail_start"], state["end"]
        self._best_weights = best_weights
        self._start -= state["seconds"]

    def _look(self) -> None:
        steps = self.step - (self.curve[-1]["step"] if self.curve else 0)
        [train_loss] = _over_ranks(torch.stack(self.since_last).sum().item() / steps)
        self.since_last.clear()
        loss = mean_loss(self._model, self._objective, self._validation)
        self._model.train()
        if rank_and_count()[0] == 0:
            self._progress(f"{self._stage} step {self.step}/{self._pace.end} loss {train_loss:.3f} val {loss:.3f}")
        if not (math.isfinite(loss) and math.isfinite(train_loss)):
            raise Diverged(
                f"{self._stage}: loss {train_loss}, validation loss {loss} at step {self.step}; "
                f"lower this fit's learning_rate (now {self._config.learning_rate})"
            )
        self.curve.append({"step": self.step, "train_loss": train_loss, "val_loss": loss})
        if loss < self.best:
            self.best = loss
            self._best_weights = {n: t.detach().to("cpu", copy=True) for n, t in self._model.state_dict().items()}
        if loss < self._to_beat - self._config.min_improvement:
            self._to_beat, self._without_improvement = loss, 0
        else:
            self._without_improvement += 1


def _identity(config: FitConfig, seed: int, lengths: Sequence[int]) -> str:
    """Of a fit: only one of the same items and settings may take up its checkpoints."""
    told = json.dumps([config.model_dump(mode="json"), seed, list(lengths)])
    return hashlib.sha256(told.encode()).hexdigest()
