import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.config import FitConfig
from rlhf_ray.errors import DataError, Diverged
from rlhf_ray.training.fit import fit, mean_loss


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


class SquaredError:
    """Items are (x, y)."""

    def length(self, item: tuple[float, float]) -> int:
        return 1

    def collate(self, items: Sequence[tuple[float, float]]) -> dict[str, Tensor]:
        x, y = zip(*items, strict=True)
        return {"x": torch.tensor(x), "y": torch.tensor(y)}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return (model(batch["x"]) - batch["y"]).square().sum(), len(batch["y"])


def make_fit(**overrides: Any) -> FitConfig:
    fields = {"learning_rate": 0.1, "batch_size": 4, "max_epochs": 50, "eval_every": 5, "min_improvement": 0.01}
    return FitConfig(**{**fields, **overrides})


def slope(k: float, n: int = 20) -> list[tuple[float, float]]:
    return [(x / n, k * x / n) for x in range(1, n + 1)]


def run(
    model: nn.Module, *, train: Any = None, validation: Any = None, lines: list[str] | None = None, **config: Any
) -> Any:
    return fit(
        model,
        SquaredError(),
        slope(2) if train is None else train,
        validation=slope(2) if validation is None else validation,
        config=make_fit(**config),
        seed=0,
        stage="sft",
        progress=[].append if lines is None else lines.append,
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
