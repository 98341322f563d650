"""The record of a run: what is written must be read back, whatever killed the writer."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.errors import DataError
from rlhf_ray.training.metrics import MetricsLog, duration, progress_line, read_metrics


def write_steps(folder: Path, *steps: int) -> None:
    with MetricsLog(folder) as log:
        for step in steps:
            log.write(step, {"objective/kl": step / 10})


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_steps_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"objective/kl": 0.5, "episode": 128, "sync/verified": True})
    assert read_metrics(tmp_path) == [{"step": 1, "objective/kl": 0.5, "episode": 128, "sync/verified": True}]


def test_a_line_is_in_the_file_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"objective/kl": 0.5})
    assert steps_of(tmp_path) == [1]
    log.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_written_as_null(tmp_path: Path, value: float) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss/value_avg": value})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss/value_avg": None}


def test_truncating_drops_the_steps_after_a_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "objec')
    log = MetricsLog(tmp_path)
    assert log.truncate_after(2) == 2
    log.write(3, {"objective/kl": 9.0})
    log.close()
    assert steps_of(tmp_path) == [1, 2, 3]
    assert read_metrics(tmp_path)[-1]["objective/kl"] == 9.0


def test_a_torn_line_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ob')
    write_steps(tmp_path, 2)
    assert steps_of(tmp_path) == [1, 2]


def test_reading_passes_over_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"kl": 1}'])
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 .*delete the line"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_has_none_and_truncates_to_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert MetricsLog(tmp_path).truncate_after(10) == 0


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    figures = [(event.step, round(event.value, 6)) for event in events.Scalars("objective/kl")]
    assert figures == [(1, 0.1), (2, 0.2)]


def test_tensorboard_shows_a_redone_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    with MetricsLog(tmp_path) as log:
        log.truncate_after(1)
        log.write(2, {"objective/kl": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    figures = [(event.step, round(event.value, 6)) for event in events.Scalars("objective/kl")]
    assert figures == [(1, 0.1), (2, 7.0)]


def test_a_progress_line_says_where_the_run_stands() -> None:
    metrics = {
        "gold/mean": 0.61,
        "objective/scores": 0.42,
        "objective/kl": 1.9,
        "objective/entropy": 2.1,
        "rollout/length_mean": 24.2,
        "time/learn_s": 1.6,
        "time/step_s": 3.1,
    }
    line = progress_line(12, 60, metrics, 151.0, kl_limit=25.0)
    assert line == "ppo 12/60  gold 0.61  reward 0.42  kl 1.90/25  entropy 2.10  len 24  3.1 s/step  eta 2m31s"


def test_a_progress_line_without_gold_does_not_mention_it() -> None:
    assert progress_line(3, 60, {"objective/scores": 0.42}) == "ppo  3/60  reward 0.42"


def test_a_progress_line_shows_a_figure_that_is_not_finite() -> None:
    assert progress_line(3, 9, {"objective/kl": float("nan")}, float("inf")) == "ppo 3/9  kl nan  eta ?"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0s"), (59.6, "1m00s"), (151, "2m31s"), (3900, "1h05m"), (-3, "0s")]
)
def test_durations_read_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
