"""Who worked when: from what actors noted to shares of the time, a trace and a table."""

import json
from pathlib import Path

import pytest

from rlhf_ray.config import dump_config, load_config
from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.roles.busy import Busy
from rlhf_ray.training.profile import Piece, Profile, chrome_trace, lane_of, prepared, profile, table


def found() -> Profile:
    """Two steps of 5 s: the generator works from 0 to 4 and 5 to 6, the learner from 4 to 4.5 and from 6 to 9."""
    lanes = {
        "generator-0": lane_of([Busy("generate", 0, 4), Busy("load_weights", 5, 6)], 10.0),
        "learner": lane_of([Busy("prepare", 4, 4.5), Busy("update", 6, 9)], 10.0),
    }
    return Profile([], [(0.0, 5.0), (5.0, 10.0)], lanes)


def test_what_lies_between_pieces_of_work_is_waiting() -> None:
    assert lane_of([Busy("update", 6, 9), Busy("prepare", 4, 4.5)], 10.0) == [
        Piece("wait", 0.0, 4),
        Piece("prepare", 4, 4.5),
        Piece("wait", 4.5, 6),
        Piece("learn", 6, 9),
        Piece("wait", 9, 10.0),
    ]


def test_what_no_phase_of_its_own_has_is_the_hand_over() -> None:
    lane = lane_of([Busy("load_weights", 0, 1), Busy("probe", 1, 2), Busy("release", 2, 3)], 3.0)
    assert {piece.phase for piece in lane} == {"hand over"}


def test_work_before_the_first_step_or_after_the_last_is_cut_off() -> None:
    assert lane_of([Busy("generate", -3, -1), Busy("generate", -1, 2), Busy("score", 9, 12)], 10.0) == [
        Piece("generate", 0.0, 2),
        Piece("wait", 2, 9),
        Piece("score", 9, 10.0),
    ]


def test_an_actor_that_did_nothing_waited_all_the_time() -> None:
    assert lane_of([], 10.0) == [Piece("wait", 0.0, 10.0)]


def test_shares_are_of_the_whole_time_and_add_up() -> None:
    shares = found().shares
    assert shares["generator-0"] == {"generate": 0.4, "wait": 0.5, "hand over": 0.1}
    assert shares["learner"] == pytest.approx({"wait": 0.65, "prepare": 0.05, "learn": 0.3})


def test_nobody_works_where_no_lane_does() -> None:
    assert found().nobody == pytest.approx(0.15)  # 4.5 to 5 and 9 to 10


def test_the_trace_has_a_lane_for_the_loop_and_each_actor_in_microseconds() -> None:
    trace = json.loads(json.dumps(chrome_trace(found())))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert list(names.values()) == ["loop", "generator-0", "learner"]
    learnt = [event for event in trace if event["name"] == "learn"]
    assert [(names[event["tid"]], event["ts"], event["dur"]) for event in learnt] == [("learner", 6_000_000, 3_000_000)]
    assert sum(event["name"] == "step" for event in trace) == 2


def test_the_table_tells_each_share() -> None:
    lines = table(found())
    assert lines[0] == "2 steps, 5.00 s each; shares of the time"
    assert lines[1].split() == ["generate", "prepare", "learn", "hand", "over", "wait"]
    assert lines[2].split() == ["generator-0", "40.0%", "0.0%", "0.0%", "10.0%", "50.0%"]
    assert "nobody worked in 15.0%" in lines[-1]


def test_a_run_without_a_loop_is_refused(tmp_path: Path) -> None:
    config = load_config(None, ["run.id=x", "method=dpo"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match="no loop"):
        profile(tmp_path, [], steps=1, say=print)
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, ["run.id=x"])))
    with pytest.raises(ConfigError, match="no loop"):
        profile(tmp_path, ["method=dpo"], steps=1, say=print)


def test_a_run_without_its_models_is_told_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, ["run.id=x"])))
    with pytest.raises(InputError, match="no base policy yet: run its command"):
        profile(tmp_path, [], steps=1, say=print)


def test_every_step_that_is_watched_has_steps_after_it_to_sample_ahead(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, ["run.id=x", "ppo.steps=30"])))
    (tmp_path / "base_policy").mkdir()
    (tmp_path / "reward_model").mkdir()
    _, config = prepared(tmp_path, ["rollout.max_staleness=2"], steps=4)
    first, warm_up = 30, 3
    assert config.ppo.steps > first + warm_up + 4 - 1 + config.rollout.max_staleness
