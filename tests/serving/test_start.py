"""What happens before and around Ray Serve when a run is served."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import DeadlineExceeded, InfrastructureError, InputError, ModelError
from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.settings import ServiceConfig
from rlhf_ray.serving.start import prepare, publish_run, refuse_taken, seats, take_down, wait_running, where_to_ask
from rlhf_ray.training.stopping import Stopping
from tests.serving.runs import SERVABLE, make_run


def config(tmp_path: Path, **settings: Any) -> ServiceConfig:
    places = {"registry": tmp_path / "registry", "store": str(tmp_path / "f.db"), "keys": str(tmp_path / "k.db")}
    return ServiceConfig(**{**places, **settings})


def another(run: Path) -> None:
    """The run's policy, different."""
    file = run / "policy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": "another"}))


def test_a_runs_models_are_published_with_their_lineage(tmp_path: Path) -> None:
    run, registry = make_run(tmp_path), Registry(tmp_path / "registry")
    published = publish_run(run, registry, by="ann")
    assert {kind: version.number for kind, version in published.items()} == {"policy": 1, "reward_model": 1}
    lineage = published["policy"].lineage
    assert (lineage["run_id"], lineage["reward_model_version"], lineage["published_by"]) == ("tiny", 1, "ann")
    assert publish_run(run, registry, by="bob") == published


def test_the_first_of_its_kind_is_promoted_and_later_ones_wait_to_be(tmp_path: Path) -> None:
    run, said = make_run(tmp_path, **SERVABLE), []
    prepare(run, config(tmp_path), say=said.append)
    assert said == ["reward model 1: served", "policy 1: served"]
    another(run)
    said.clear()
    prepare(run, config(tmp_path), say=said.append)
    assert said == ["reward model 1: served", "policy 2: published; 1 is served"]
    registry = Registry(tmp_path / "registry")
    assert len(registry.history("policy")) == 1


def test_a_reward_model_that_is_no_better_than_none_is_promoted_by_force_alone(tmp_path: Path) -> None:
    run, said = make_run(tmp_path, **SERVABLE), []
    gate = {
        "passed": False,
        "baseline": "shorter",
        "baseline_accuracy": 0.61,
        "better_by": 0.01,
        "better_by_ci95": [-0.02, 0.04],
    }
    (run / "reward_model.json").write_text(json.dumps({"gate": gate}))
    with pytest.raises(InputError, match="--force"):
        prepare(run, config(tmp_path), say=said.append)
    assert said[0].startswith("reward model 1: published and not promoted, for it is not surely better than no model")
    registry = Registry(tmp_path / "registry")
    with pytest.raises(InputError, match=r"beside 'shorter', which is right in 0.610; .*--force"):
        registry.promote("reward_model", 1, by="ann")
    registry.promote("reward_model", 1, by="ann", force=True)
    prepare(run, config(tmp_path), say=said.append)
    assert said[-2] == "reward model 1: served"


def test_a_model_whose_part_is_left_out_is_published_and_not_said_to_be_served(tmp_path: Path) -> None:
    said: list[str] = []
    prepare(make_run(tmp_path, **SERVABLE), config(tmp_path, parts={"policy"}), say=said.append)
    assert said == ["reward model 1: published", "policy 1: served"]


def test_without_a_run_what_is_promoted_is_served_and_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no policy is promoted"):
        prepare(None, config(tmp_path), say=print)
    with pytest.raises(InputError, match="no reward model is promoted"):
        prepare(None, config(tmp_path, parts={"reward"}), say=print)
    prepare(None, config(tmp_path, parts={"feedback"}), say=print)
    prepare(make_run(tmp_path, **SERVABLE), config(tmp_path), say=lambda line: None)
    prepare(None, config(tmp_path), say=print)


def test_a_policy_that_the_engine_cannot_run_on_a_cpu_is_refused_before_it_starts(tmp_path: Path) -> None:
    run = make_run(tmp_path, hidden=32)
    with pytest.raises(ModelError, match="heads of size 16"):
        prepare(run, config(tmp_path), say=lambda line: None)
    prepare(run, config(tmp_path, policy={"gpus": 1}), say=lambda line: None)
    prepare(run, config(tmp_path, parts={"reward", "feedback"}), say=lambda line: None)


def test_a_run_that_is_not_done_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "policy").rename(run / "elsewhere")
    with pytest.raises(InputError, match="has no policy yet"):
        prepare(run, config(tmp_path), say=print)


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1 port {port}"):
            refuse_taken("127.0.0.1", port)
    refuse_taken("127.0.0.1", port)


def test_there_are_seats_for_all_replicas_that_may_come(tmp_path: Path) -> None:
    assert seats(config(tmp_path)) == 4
    assert (
        seats(config(tmp_path, policy={"replicas": 2, "max_replicas": 4, "threads": 2}, reward={"replicas": 3})) == 13
    )
    assert seats(config(tmp_path, parts={"feedback"})) == 2


class FakeServe:
    """Statuses, one a look, the last one for ever."""

    def __init__(self, *statuses: str) -> None:
        self.statuses = list(statuses)

    def status(self) -> Any:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        deployment = SimpleNamespace(message="no such model" if status == "DEPLOY_FAILED" else "")
        application = SimpleNamespace(
            status=status, message=status.lower(), deployments={"PolicyDeployment": deployment}
        )
        return SimpleNamespace(applications={} if status == "NONE" else {"rlhf": application})


def test_the_wait_ends_when_all_run_when_one_fails_or_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.serving.start.LOOK_EVERY_S", 0.001)
    wait_running(FakeServe("NONE", "DEPLOYING", "RUNNING"), Stopping(), say=print)
    with pytest.raises(InfrastructureError, match="PolicyDeployment: no such model"):
        wait_running(FakeServe("DEPLOYING", "DEPLOY_FAILED"), Stopping(), say=print)
    with pytest.raises(DeadlineExceeded, match=r"not up after 0\.05 s"):
        wait_running(FakeServe("DEPLOYING"), Stopping(), say=print, within_s=0.05)


def test_who_is_told_where_to_ask_gets_a_command_that_is_one(tmp_path: Path) -> None:
    text = where_to_ask(config(tmp_path, host="::1"))
    assert "http://[::1]:8000/v1/chat/completions" in text
    body = text.split("-d '")[1].split("'")[0]
    assert json.loads(body)["messages"][0]["role"] == "user"
    assert "/docs" in text
    assert "/docs" not in where_to_ask(config(tmp_path, host="0.0.0.0"))
    assert "curl" not in where_to_ask(config(tmp_path, parts={"reward"}))


@pytest.mark.parametrize("everything", [False, True])
def test_taking_down_ends_serve_itself_only_where_ray_goes_on_and_says_what_was_cut_off(everything: bool) -> None:
    done: list[str] = []

    def too_slow(name: str) -> None:
        done.append(f"delete {name}")
        raise TimeoutError

    said: list[str] = []
    fake = SimpleNamespace(delete=too_slow, shutdown=lambda: done.append("shutdown"))
    take_down(fake, everything=everything, say=said.append)
    assert done == ["delete rlhf", *(["shutdown"] if everything else [])]
    assert "cut off" in said[0]
