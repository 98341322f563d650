"""What a cluster has and may grow to, from files as they are written for it."""

import socket
from pathlib import Path

import pytest

from rlhf_ray import clusters
from rlhf_ray.clusters import Node, growth, knock, look_at, node_types, token_refusals_explained
from rlhf_ray.errors import ConfigError, InfrastructureError

LAUNCHER = """
cluster_name: test
max_workers: 5
provider: {type: aws, region: us-west-2}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4}, node_config: {}}
  gpu: {resources: {CPU: 8, GPU: 1, rlhf_generator: 1}, node_config: {}, max_workers: 4}
  cpu: {resources: {CPU: 16}, node_config: {}}
"""
KUBERAY = """
apiVersion: v1
kind: Secret
---
apiVersion: ray.io/v1
kind: RayJob
spec:
  rayClusterSpec:
    enableInTreeAutoscaling: SCALES
    headGroupSpec:
      rayStartParams: {num-cpus: "0"}
      template: {spec: {containers: [{name: ray-head}]}}
    workerGroupSpecs:
      - groupName: generator
        minReplicas: 0
        maxReplicas: 3
        resources: {CPU: "8", GPU: "1", rlhf_generator: "1"}
        rayStartParams: {}
        template: {spec: {containers: [{name: ray-worker}]}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_a_launcher_config_says_what_may_come_and_no_second_head_does(tmp_path: Path) -> None:
    found = growth(node_types(write(tmp_path, LAUNCHER)))
    assert {group.name: group.count for group in found.groups} == {"head": 0, "gpu": 4, "cpu": 5}
    assert (found.at_most, found.told) == (5, "told")
    assert found.groups[1].each == {"CPU": 8.0, "GPU": 1.0, "rlhf_generator": 1.0}


def test_what_is_there_already_does_not_come_again(tmp_path: Path) -> None:
    nodes = tuple(Node(group, {}, {}) for group in ("head", "gpu", "gpu", "", "of another cluster"))
    found = growth(node_types(write(tmp_path, LAUNCHER)), nodes)
    assert ({group.name: group.count for group in found.groups}["gpu"], found.at_most) == (2, 3)


def test_a_kuberay_manifest_says_it_too_whichever_kind_it_is(tmp_path: Path) -> None:
    found = growth(node_types(write(tmp_path, KUBERAY.replace("SCALES", "true"))))
    assert {group.name: group.count for group in found.groups} == {"headgroup": 0, "generator": 3}
    assert found.groups[1].each == {"CPU": 8.0, "GPU": 1.0, "rlhf_generator": 1.0}


def test_a_kuberay_cluster_without_the_autoscaler_does_not_grow(tmp_path: Path) -> None:
    assert growth(node_types(write(tmp_path, KUBERAY.replace("SCALES", "false")))).groups == ()


def test_ones_own_machines_do_not_multiply(tmp_path: Path) -> None:
    file = write(tmp_path, "provider: {type: local, head_ip: a, worker_ips: [b, c]}")
    assert (growth(node_types(file)).groups, growth(node_types(file)).told) == ((), "told")


@pytest.mark.parametrize("text", ["ppo: {steps: 3}", "- a\n- b", "a: [", "kind: RayCluster\nspec: {}"])
def test_a_file_that_is_no_cluster_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml"):
        node_types(write(tmp_path, text))
    with pytest.raises(ConfigError, match="nowhere"):
        node_types(tmp_path / "nowhere.yaml")


def test_an_autoscaler_shows_by_the_groups_of_its_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clusters, "BOOTSTRAP", tmp_path / "none.yaml")
    for group, told in (("", "fixed"), ("head", "untold")):
        node = Node(group, {"CPU": 1.0}, {"CPU": 1.0})
        monkeypatch.setattr(clusters, "_ask_gcs", lambda address, node=node: ((node,), None))
        assert look_at("127.0.0.1:1").growth.told == told


def test_on_a_head_that_the_launcher_started_its_config_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clusters, "BOOTSTRAP", write(tmp_path, LAUNCHER))
    monkeypatch.setattr(clusters, "_ask_gcs", lambda address: ((), None))
    monkeypatch.setattr(clusters, "_ask_dashboard", lambda address: ())
    assert look_at("auto").growth.told == "told"
    assert look_at("http://elsewhere:8265").growth.told == "fixed"  # that file is about the machine it lies on


def test_without_an_address_it_is_this_machine_with_its_gpus() -> None:
    found = look_at(None)
    assert found.ours
    assert set(found.nodes[0].total) == {"GPU"}


def test_nobody_listening_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InfrastructureError, match=r"no Ray answers at here: .*refused"):
        knock("127.0.0.1", port, "here")


def test_a_missing_and_a_wrong_token_are_told_apart() -> None:
    from ray.exceptions import AuthenticationError

    for cause, told in (
        ("Token authentication is enabled but no authentication token was found", "none was shown"),
        ("Token authentication is enabled but the authentication token is invalid or incorrect.", "refuses the token"),
    ):
        with (
            pytest.raises(ConfigError, match=rf"at here .*{told}.*RAY_AUTH_TOKEN_PATH"),
            token_refusals_explained("here"),
        ):
            raise AuthenticationError(cause)


@pytest.mark.parametrize(("enabled", "told"), [(True, "refuses the token"), (False, "none was shown")])
def test_the_control_service_refuses_in_words_of_its_own(
    monkeypatch: pytest.MonkeyPatch, enabled: bool, told: str
) -> None:
    from ray.exceptions import RaySystemError

    monkeypatch.setattr("ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: enabled)
    with pytest.raises(ConfigError, match=told), token_refusals_explained("here"):
        raise RaySystemError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect.")
    with pytest.raises(RaySystemError), token_refusals_explained("here"):
        raise RaySystemError("RPC error: Deadline Exceeded")
