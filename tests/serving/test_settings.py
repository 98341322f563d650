"""What a service can be told, and what it refuses by name."""

from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.serving.settings import ServiceConfig, config_of, is_loopback, service_config


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"of the service: unknown key 'policy.replica'.*'policy.replicas'"):
        service_config({"policy": {"replica": 2}})


def test_parts_are_the_three_that_there_are_and_at_least_one() -> None:
    assert service_config({"parts": ["reward"]}).parts == {"reward"}
    for wrong in ([], ["polcy"]):
        with pytest.raises(ConfigError, match="parts"):
            service_config({"parts": wrong})


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_scaling_up_does_not_mean_down(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.max_replicas=1 is below"):
        service_config({name: {"replicas": 2, "max_replicas": 1}})


def test_more_than_8_choices_cannot_be_allowed() -> None:
    with pytest.raises(ConfigError, match="max_choices"):
        service_config({"policy": {"max_choices": 9}})


@pytest.mark.parametrize(
    ("host", "stays"),
    [
        *((host, True) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "")),
    ],
)
def test_only_loopback_is_loopback(host: str, stays: bool) -> None:
    assert is_loopback(host) is stays


def test_a_service_answers_to_loopback_its_own_host_and_the_names_it_was_given() -> None:
    names = ServiceConfig(host="10.0.0.1", hosts=("rlhf.example.org",)).trusted_hosts
    assert names == {"127.0.0.1", "localhost", "::1", "10.0.0.1", "rlhf.example.org"}


def test_options_and_overrides_name_files_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of({"port": 9000, "registry": "r"}, ["policy.replicas=2", "store=sqlite:///f.db", "parts=[policy]"])
    assert (config.port, config.policy.replicas, config.parts) == (9000, 2, {"policy"})
    assert (config.registry, config.store) == (tmp_path / "r", f"sqlite:///{tmp_path}/f.db")
    assert config.keys == f"{tmp_path}/service/keys.db"
    with pytest.raises(ConfigError, match="unknown key 'polcy'"):
        config_of({}, ["polcy.replicas=2"])
