"""What `rlhf eval --against` refuses before anything starts; the comparison itself: tests/on_ray/test_run.py."""

from pathlib import Path

import pytest

from rlhf_ray.errors import InputError, ModelError
from rlhf_ray.training.versus import versus
from tests.serving.runs import make_run


def refused(run: Path, other: Path | None, judge: Path | None = None) -> None:
    versus(run, other, judge=judge, samples=1, say=print)


def test_a_run_without_a_policy_or_the_other_without_one_is_refused(tmp_path: Path) -> None:
    done, other = make_run(tmp_path), make_run(tmp_path, "other")
    (other / "policy").rename(other / "elsewhere")
    with pytest.raises(InputError, match="has no policy yet"):
        refused(other, done)
    with pytest.raises(InputError, match="has no policy yet"):
        refused(done, other)


def test_what_is_no_policy_or_no_judge_is_refused_by_its_path(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ModelError, match="nowhere"):
        refused(run, tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no reward model at .*nobody"):
        refused(run, make_run(tmp_path, "other"), tmp_path / "nobody")


def test_where_the_run_has_no_reward_model_one_has_to_be_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "reward_model").rename(run / "elsewhere")
    with pytest.raises(InputError, match=r"no reward model of its own: name one .* with --judge FOLDER"):
        refused(run, make_run(tmp_path, "other"))


def test_a_policy_against_itself_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(InputError, match="the run's own policy"):
        refused(run, run)


def test_a_sheet_that_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    sheet = tmp_path / "people.csv"
    sheet.write_text("hours of work")
    with pytest.raises(InputError, match="may hold people's judgements"):
        versus(make_run(tmp_path), None, judge=None, samples=1, say=print, sheet=sheet)
    assert sheet.read_text() == "hours of work"
