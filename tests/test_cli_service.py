"""The commands around the service: what they print, and what they refuse."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.errors import InputError
from tests.serving.runs import make_run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rlhf(*arguments: str | Path) -> str:
    """What a command prints for programs; its error, where it ends with one."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception:
        raise done.exception
    return done.stdout


def test_versions_are_listed_promoted_and_rolled_back(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "summary.json").write_text(json.dumps({"steps": 30, "reward": {"before": 0.5, "after": 1.25}}))
    assert rlhf("policies", "promote", run, "--reason", "first") == "policy 1 is promoted\n"
    config = run / "policy" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": "another"}))
    assert rlhf("policies", "promote", run) == "policy 2 is promoted\n"
    listed = rlhf("policies", "list").splitlines()
    assert [line[:3] for line in listed[1:]] == ["  1", "* 2"]
    assert "tiny" in listed[1]
    assert "0.500 > 1.250, - > -" in listed[1]
    assert rlhf("policies", "rollback") == "policy 1 is promoted again\n"
    assert rlhf("policies", "promote", "2") == "policy 2 is promoted\n"
    assert rlhf("policies", "promote", run, "--kind", "reward_model") == "reward model 1 is promoted\n"


def test_keys_are_made_listed_and_revoked() -> None:
    key = rlhf("keys", "create", "phone", "--role", "app").strip()
    assert key.startswith("rlhf_")
    listed = rlhf("keys", "list")
    assert "phone" in listed
    assert key not in listed
    assert rlhf("keys", "revoke", "phone") == "phone is revoked\n"
    assert rlhf("keys", "list").splitlines()[1].count("2") > 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["policies", "list"], "no registry at service/registry"),
        (["policies", "promote", "3"], "no registry at"),
        (["policies", "promote", "nowhere"], "nowhere is not a run folder"),
        (["keys", "list"], "no keys at service/keys.db"),
        (["keys", "revoke", "phone"], "no keys at"),
        (["keys", "create", "My Phone", "--role", "app"], "key name"),
        (["serve", "nowhere"], "nowhere is not a run folder"),
        (["serve"], "no policy is promoted"),
        (["serve", "polcy.replicas=2"], "unknown key 'polcy'"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        rlhf(*arguments)


def test_looking_makes_nothing(tmp_path: Path) -> None:
    for command in ("policies", "keys"):
        with pytest.raises(InputError):
            rlhf(command, "list")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "keys", "policies"])
def test_help_teaches(command: str) -> None:
    text = " ".join(rlhf(command, "--help").split())
    for taught in {
        "serve": ("Answer over HTTP", "policy.replicas=2", "rlhf policies promote"),
        "keys": ("annotator: sends feedback", "answers its own machine only"),
        "policies": ("swap one by one", "the old version stays"),
    }[command]:
        assert taught in text
