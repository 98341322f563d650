import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from rlhf_ray.algo.schedules import rate_factor


def test_schedules_worked_by_hand() -> None:
    def factors(schedule: str) -> list[float]:
        return [rate_factor(step, steps=6, warmup=2, schedule=schedule) for step in range(7)]  # type: ignore[arg-type]

    assert factors("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert factors("linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    assert factors("cosine") == pytest.approx([0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0])


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_after_the_rise_they_are_transformers_own(schedule: str, reference: object) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = reference(optimizer, 5, 40).lr_lambdas[0]  # type: ignore[operator]
    for step in range(5, 41):
        assert rate_factor(step, steps=40, warmup=5, schedule=schedule) == pytest.approx(theirs(step))  # type: ignore[arg-type]


def test_a_run_that_is_made_longer_never_falls_below_zero() -> None:
    assert rate_factor(50, steps=40, warmup=0, schedule="linear") == 0.0
    assert rate_factor(0, steps=1, warmup=0, schedule="cosine") == 1.0
