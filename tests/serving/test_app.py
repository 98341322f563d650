"""What is deployed, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.serving.app import build
from rlhf_ray.serving.auth import KeyStore
from rlhf_ray.serving.settings import service_config

SERVE_CONFIGS = sorted((Path(__file__).parents[2] / "deployments" / "serve").glob("*.yaml"))


def args(tmp_path: Path, **more: Any) -> dict[str, Any]:
    places = {"registry": "registry", "store": "feedback.db", "keys": "keys.db"}
    return {**{name: str(tmp_path / place) for name, place in places.items()}, **more}


def deployed(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """The options of each deployment, by its name."""
    built = build_app(build(args(tmp_path, **more)), name="rlhf", default_runtime_env={})
    return {deployment.name: deployment for deployment in built.deployments}


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (["policy", "reward", "feedback"], {"Policy", "Versions", "Reward", "Records"}),
        (["policy"], {"Policy", "Versions"}),
        (["reward"], {"Reward"}),
        (["feedback"], {"Records"}),
    ],
)
def test_what_is_served_is_deployed_and_nothing_else(tmp_path: Path, parts: list[str], names: set[str]) -> None:
    assert set(deployed(tmp_path, parts=parts)) == {"Door", *(f"{name}Deployment" for name in names)}


def test_the_writer_and_the_registrys_voice_are_one_each_whatever_the_load(tmp_path: Path) -> None:
    found = deployed(tmp_path, policy={"replicas": 2, "max_replicas": 4}, doors=3)
    for name in ("RecordsDeployment", "VersionsDeployment"):
        assert found[name].num_replicas == 1
        assert found[name]._deployment_config.autoscaling_config is None
    assert found["Door"].num_replicas == 3


def test_replicas_have_the_threads_they_are_told_and_grow_with_the_load(tmp_path: Path) -> None:
    found = deployed(tmp_path, policy={"replicas": 2, "max_replicas": 4, "threads": 3}, reward={"replicas": 2})
    policy, reward = found["PolicyDeployment"], found["RewardDeployment"]
    assert policy.ray_actor_options["num_cpus"] == 3
    assert policy.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    scaling = policy._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 4)
    assert (reward.num_replicas, reward._deployment_config.autoscaling_config) == (2, None)
    assert policy.max_queued_requests == 64


def test_a_reward_replica_is_added_where_one_always_has_a_call_under_way(tmp_path: Path) -> None:
    reward = deployed(tmp_path, reward={"max_replicas": 3}, doors=2)["RewardDeployment"]
    scaling = reward._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 1)
    assert reward.max_ongoing_requests > 2 * 2  # two calls of each door, and whoever asks whether it is ready


@pytest.mark.parametrize("name", ["registry", "store", "keys"])
def test_a_place_that_depends_on_where_a_replica_starts_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: here.* is relative"):
        build(args(tmp_path, **{name: "here/it.db"}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "rlhf.example.org"])
def test_without_keys_nobody_else_is_listened_to(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="rlhf keys create"):
        build(args(tmp_path, host=host))
    assert not (tmp_path / "keys.db").exists()
    KeyStore(tmp_path / "keys.db").create("root", "admin")
    build(args(tmp_path, host=host))


def test_four_serve_configs_are_shipped() -> None:
    assert [path.stem for path in SERVE_CONFIGS] == ["all", "feedback", "policy", "reward"]


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.stem)
def test_each_serve_config_is_one_that_ray_and_we_take(path: Path, tmp_path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    [application] = schema.applications
    assert application.import_path == "rlhf_ray.serving.app:build"
    config = service_config(application.args)
    assert (schema.http_options.host, schema.http_options.port) == (config.host, config.port)
    assert schema.http_options.host == "127.0.0.1"  # Serve's own default is every interface
    found = deployed(tmp_path, **{key: value for key, value in application.args.items() if key not in args(tmp_path)})
    told = {deployment.name for deployment in application.deployments}
    assert told
    assert told <= set(found) - {"RecordsDeployment", "VersionsDeployment"}
    assert all(deployment.autoscaling_config for deployment in application.deployments)


def test_a_planted_mistake_in_a_serve_config_is_caught() -> None:
    content = yaml.safe_load((SERVE_CONFIGS[0]).read_text(encoding="utf-8"))
    content["applications"][0]["args"]["policy"]["replica"] = 2
    with pytest.raises(ConfigError, match=r"unknown key 'policy\.replica'"):
        service_config(content["applications"][0]["args"])
