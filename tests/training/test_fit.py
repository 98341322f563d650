import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_ray.config import FitConfig
from rlhf_ray.errors import ConfigError, DataError, Diverged
from rlhf_ray.training import fit as fitting
from rlhf_ray.training.fit import fit, mean_loss
from rlhf_ray.training.trainer import drop_checkpoints


class Line(nn.Module):
    """y = weight * x; stands in for a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0]]))
        self.config = Config()

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).flatten()


class Config:
    use_cache = True

    def to_json_string(self) -> str:
        return "{}"


class SquaredError:
    """Items are (x, y)."""

    def length(self, item: tuple[float, float]) -> int:
        return 1

    def collate(self, items: Sequence[tuple[float, float]]) -> dict[str, Tensor]:
        x, y = zip(*items, strict=True)
        return {"x": torch.tensor(x), "y": torch.tensor(y)}

    def terms(self, batch: dict[str, Tensor]) -> int:
        return len(batch["y"])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().sum()


def make_fit(**overrides: Any) -> FitConfig:
    fields = {"learning_rate": 0.1, "batch_size": 4, "max_epochs": 50, "eval_every": 5, "min_improvement": 0.01}
    return FitConfig(**{**fields, **overrides})


def slope(k: float, n: int = 20) -> list[tuple[float, float]]:
    return [(x / n, k * x / n) for x in range(1, n + 1)]


def run(
    model: nn.Module,
    *,
    train: Any = None,
    validation: Any = None,
    lines: list[str] | None = None,
    say: Any = None,
    folder: Path | None = None,
    **config: Any,
) -> Any:
    return fit(
        model,
        SquaredError(),
        slope(2) if train is None else train,
        validation=slope(2) if validation is None else validation,
        config=make_fit(**config),
        seed=0,
        stage="sft",
        progress=say or ([].append if lines is None else lines.append),
        folder=folder,
    )


def test_a_fit_learns_and_ends_before_its_last_epoch_once_the_loss_is_flat() -> None:
    model = Line()
    result = run(model)
    assert model.weight.item() == pytest.approx(2, abs=0.1)
    assert result.flat
    assert result.steps < 250
    assert result.validation_loss < 0.01


def test_a_loss_that_still_falls_at_the_last_epoch_is_not_called_flat() -> None:
    result = run(Line(), max_epochs=4, learning_rate=0.01)
    assert not result.flat
    assert result.steps == 20


def test_flat_means_that_patience_looks_brought_no_improvement() -> None:
    result = run(Line(), min_improvement=100, patience=2)  # only the first look can improve on nothing
    flat_at = result.curve[2]["step"]
    assert flat_at == 15
    assert result.flat
    assert result.steps == flat_at + round(0.2 * flat_at)  # the decay


def test_the_model_keeps_the_weights_of_its_best_look() -> None:
    model = Line()  # training pulls past what validation wants
    result = run(model, validation=slope(1), learning_rate=0.05)
    losses = [look["val_loss"] for look in result.curve]
    assert result.validation_loss == min(losses) < losses[0]
    assert mean_loss(model, SquaredError(), slope(1)) == pytest.approx(min(losses))  # type: ignore[arg-type]


def test_the_curve_has_every_look_and_progress_says_the_same() -> None:
    lines: list[str] = []
    result = run(Line(), lines=lines, max_epochs=4)
    assert [look["step"] for look in result.curve] == [5, 10, 15, 20]
    last = result.curve[-1]
    assert lines[-1] == f"sft step 20/20 loss {last['train_loss']:.3f} val {last['val_loss']:.3f}"


def test_fits_of_one_seed_are_equal_and_the_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again = run(Line()), run(Line())
    assert first.curve == again.curve
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fit_leaves_the_models_cache_setting_as_it_was() -> None:
    model = Line()
    run(model)
    assert model.config.use_cache
    assert not model.training


def test_a_loss_that_is_not_finite_stops_the_fit_with_the_way_out() -> None:
    with pytest.raises(Diverged, match=r"sft: .* at step 5; lower this fit's learning_rate \(now 0\.1\)"):
        run(Line(), train=[(1.0, math.nan)] * 8)


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_fit_without_data_is_an_error(empty: str) -> None:
    with pytest.raises(DataError, match="it needs both"):
        run(Line(), **{empty: []})


class Crash(Exception):
    """Stands in for a process that was killed."""


def crash_at(step: int) -> Callable[[str], None]:
    def say(line: str) -> None:
        if f"step {step}/" in line:
            raise Crash

    return say


NOISY: dict[str, Any] = {
    "train": [(x / 22, 2 * x / 22 + (-1) ** x * 0.3) for x in range(1, 23)],  # 22 items: the last batch is a small one
    "max_epochs": 7,
    "min_improvement": 0.0,
    "learning_rate": 0.03,
}


FLAT_AT_15 = {"min_improvement": 100.0, "patience": 2}


@pytest.mark.parametrize(("at", "kept", "settings"), [(5, 4, {}), (10, 9, {}), (35, 34, {}), (18, 17, FLAT_AT_15)])
def test_a_fit_that_broke_off_goes_on_to_the_same_weights(
    at: int, kept: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**NOISY, **settings}
    unbroken = Line()
    wanted = run(unbroken, **config)
    monkeypatch.setattr(fitting, "SAVE_AFTER_S", 0.0)
    with pytest.raises(Crash):
        run(Line(), **config, folder=tmp_path, say=crash_at(at))
    lines: list[str] = []
    model = Line()
    result = run(model, **config, folder=tmp_path, lines=lines)
    assert lines[0] == f"sft goes on from its checkpoint at step {kept}"
    assert result.curve == wanted.curve
    assert (result.steps, result.flat) == (wanted.steps, wanted.flat)
    assert torch.equal(model.weight, unbroken.weight)


def test_each_epoch_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    collate = SquaredError.collate

    def watched(self: SquaredError, items: Sequence[tuple[float, float]]) -> dict[str, Tensor]:
        if len(items) <= 4:  # not a look
            seen.extend(x for x, _ in items)
        return collate(self, items)

    monkeypatch.setattr(SquaredError, "collate", watched)
    run(Line(), **{**NOISY, "max_epochs": 2})
    assert sorted(seen[:22]) == sorted(seen[22:44])
    assert seen[:22] != seen[22:44]


def test_checkpoints_between_looks_lose_nothing_either(tmp_path: Path) -> None:
    wanted = run(Line(), **NOISY)
    each = {**NOISY, "trainer": {"save_steps": 4}}
    with pytest.raises(Crash):
        run(Line(), **each, folder=tmp_path, say=crash_at(15))
    lines: list[str] = []
    assert run(Line(), **each, folder=tmp_path, lines=lines).curve == wanted.curve
    assert lines[0] == "sft goes on from its checkpoint at step 12"


def test_a_checkpoint_that_a_crash_cut_short_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAVE_AFTER_S", 0.0)
    with pytest.raises(Crash):
        run(Line(), **NOISY, folder=tmp_path, say=crash_at(20))
    (tmp_path / "checkpoint-19" / "fit.json").unlink()
    lines: list[str] = []
    assert run(Line(), **NOISY, folder=tmp_path, lines=lines).curve == run(Line(), **NOISY).curve
    assert lines[0].endswith("at step 18")


def test_a_fit_of_other_items_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAVE_AFTER_S", 0.0)
    with pytest.raises(Crash):
        run(Line(), **NOISY, folder=tmp_path, say=crash_at(20))
    lines: list[str] = []
    run(Line(), **{**NOISY, "train": NOISY["train"][:-1]}, folder=tmp_path, lines=lines)
    assert lines[0].startswith("sft step 5/")


def test_a_fit_that_was_done_is_taken_as_it_is(tmp_path: Path) -> None:
    first, again = Line(), Line()
    wanted = run(first, **NOISY, folder=tmp_path)
    lines: list[str] = []
    assert run(again, **NOISY, folder=tmp_path, lines=lines).curve == wanted.curve
    assert len(lines) == 1
    assert torch.equal(first.weight, again.weight)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = Line(), Line()
    wanted = run(whole, **NOISY)
    result = run(parts, **NOISY, trainer={"gradient_accumulation_steps": 2})
    assert [look["val_loss"] for look in result.curve] == pytest.approx([look["val_loss"] for look in wanted.curve])
    assert parts.weight.item() == pytest.approx(whole.weight.item())


def test_accumulation_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=3 does not divide the 4 items"):
        run(Line(), trainer={"gradient_accumulation_steps": 3})


class Rates(TrainerCallback):  # type: ignore[misc]
    seen: ClassVar[list[float]] = []

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_schedule_of_trainers_own_sets_the_rate_and_callbacks_are_told() -> None:
    Rates.seen.clear()
    run(
        Line(),
        **{**NOISY, "max_epochs": 2, "learning_rate": 0.4},
        trainer={"lr_scheduler_type": "linear"},
        callbacks=("tests.training.test_fit:Rates",),
    )
    assert Rates.seen == pytest.approx([0.4 * (1 - step / 12) for step in range(12)])


@pytest.mark.parametrize(
    ("name", "why"),
    [("nowhere.at:All", "cannot import nowhere.at:All"), ("math:sqrt", "no class of transformers.TrainerCallback")],
)
def test_a_callback_that_is_none_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run(Line(), callbacks=(name,))


def test_what_transformers_refuses_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="transformers refuses trainer="):
        run(Line(), trainer={"optim": "gradient_ascent"})


def test_what_is_logged_for_tensorboard_outlasts_the_checkpoints(tmp_path: Path) -> None:
    run(Line(), **NOISY, folder=tmp_path, trainer={"report_to": "tensorboard", "logging_steps": 5})
    assert list(tmp_path.glob("checkpoint-*"))
    drop_checkpoints(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))
