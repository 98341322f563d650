"""Supervised fits: what each is told, transformers' own arguments among it."""

import difflib
from typing import Annotated, Any

from pydantic import Field, field_validator

from rlhf_ray.config.section import Count, Positive, Section

TRAINER_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "fp16",
    "full_determinism",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "logging_first_step",
    "logging_steps",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "project",
    "report_to",
    "run_name",
    "save_steps",
    "save_total_limit",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "use_cpu",
    "use_liger_kernel",
    "warmup_steps",
)
"""Of transformers' `TrainingArguments`, those that a fit hands on as they are."""

SAID_BY = {
    "data_seed": "seed",
    "eval_steps": "eval_every",
    "eval_strategy": "eval_every",
    "early_stopping_patience": "patience",
    "early_stopping_threshold": "min_improvement",
    "learning_rate": "learning_rate",
    "load_best_model_at_end": "every fit, which always does",
    "max_steps": "max_epochs",
    "num_train_epochs": "max_epochs",
    "output_dir": "run.root and run.id",
    "per_device_train_batch_size": "batch_size",
    "resume_from_checkpoint": "the same command, which goes on where it was",
    "seed": "seed",
    "weight_decay": "weight_decay",
}
"""Trainer's names for what a fit calls otherwise."""


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
    trainer: dict[str, Any] = Field(default_factory=dict)
    """More of transformers' `TrainingArguments` by their own names; with `lr_scheduler_type` the rate goes by that and
    not by `tail`. docs/algorithms.md has the list."""
    callbacks: tuple[str, ...] = ()
    """`TrainerCallback` classes, `package.module:Name`, made without arguments and told of every step."""

    @field_validator("trainer")
    @classmethod
    def _trainer_takes_it(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        for name in chosen:
            if name in SAID_BY:
                raise ValueError(f"{name} is said by {SAID_BY[name]} here: set that")
            if name not in TRAINER_ARGUMENTS:
                near = difflib.get_close_matches(name, TRAINER_ARGUMENTS, n=1, cutoff=0.0)[0]
                raise ValueError(f"{name} is none of the Trainer arguments that a fit takes; the nearest is {near}")
        for name in {"warmup_steps", "lr_scheduler_kwargs"} & set(chosen):
            if "lr_scheduler_type" not in chosen:
                raise ValueError(f"{name} needs lr_scheduler_type beside it: without, the fit has its own schedule")
        return chosen


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
