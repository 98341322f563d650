"""What a Ray cluster has now and what it may grow to, read in seconds from whoever knows it.

| asked                          | knows                                                                      |
|--------------------------------|----------------------------------------------------------------------------|
| the head's GCS (`host:port`)   | nodes, what is free on them; what may come, where its autoscaler reports it |
| the dashboard (`http://...`)   | nodes                                                                      |
| the cluster's own config file  | what may come: launcher YAML or KubeRay manifest                           |
| `~/ray_bootstrap_config.yaml`  | the same, on a head that Ray's launcher started                            |
"""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.roles.joining import use_token

ANSWER_S = 5
"""Seconds that a cluster has for an answer; a preflight asks at most twice."""
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where Ray's launcher leaves a cluster's config on its head."""
DASHBOARD_PORT = 8265
GROUP_LABEL = "ray.io/node-group"
ANY_NUMBER = 10**9
Told = Literal["fixed", "untold", "told"]
TOKEN_HELP = "set RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN or its file as RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class Node:
    """A machine that is there.

    Example: `Node("worker", total={"CPU": 8.0}, free={"CPU": 6.0})`
    """

    group: str
    """The node type of the cluster's config that it was made from; empty where that is not known."""
    total: dict[str, float]
    free: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Machines of one kind that may still come."""

    name: str
    count: int
    each: dict[str, float]


@dataclass(frozen=True)
class Growth:
    """What a cluster may grow to."""

    groups: tuple[Group, ...] = ()
    at_most: int = ANY_NUMBER
    """Nodes that may still come in all."""
    told: Told = "fixed"
    """`told` by a config; `untold`: an autoscaler is at work, its limits are not known; `fixed`: there is none."""


@dataclass(frozen=True)
class Cluster:
    """What there is to plan with."""

    nodes: tuple[Node, ...]
    growth: Growth = Growth()
    ours: bool = False
    """Whether Ray will be started here for the run alone."""


def look_at(address: str | None, config_file: Path | None = None) -> Cluster:
    """The cluster at an address (`auto`, `host:port`, a dashboard's `http://host:port`); None: this machine.

    Raises `InfrastructureError` where none answers and `ConfigError` where it refuses the token.
    """
    if address is None:
        return Cluster((_this_machine(),), ours=True)
    is_dashboard = address.startswith(("http://", "https://"))
    nodes, reported = (_ask_dashboard(address), None) if is_dashboard else _ask_gcs(address)
    if config_file is None and not is_dashboard and BOOTSTRAP.expanduser().is_file():
        config_file = BOOTSTRAP.expanduser()
    kinds = node_types(config_file) if config_file is not None else reported
    if kinds is not None:
        return Cluster(nodes, growth(kinds, nodes))
    return Cluster(nodes, Growth(told="untold" if any(node.group for node in nodes) else "fixed"))


def growth(config: dict[str, Any], nodes: tuple[Node, ...] = ()) -> Growth:
    """What may still come by a launcher config, less what is there already."""
    head, limit = config.get("head_node_type"), config.get("max_workers", ANY_NUMBER)
    groups = []
    for name, kind in config["available_node_types"].items():
        there = sum(node.group == name for node in nodes)
        most = 0 if name == head else kind.get("max_workers", limit)
        amounts = {resource: float(amount) for resource, amount in kind.get("resources", {}).items()}
        groups.append(Group(name, max(0, most - there), amounts))
    workers = sum(node.group in config["available_node_types"] and node.group != head for node in nodes)
    return Growth(tuple(groups), at_most=max(0, limit - workers), told="told")


def node_types(path: Path) -> dict[str, Any]:
    """`available_node_types` and its like from a cluster's config, a KubeRay manifest turned into the same form.

    Raises `ConfigError` where the file is neither.
    """
    try:
        documents = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(item, dict)]
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the cluster's config {path}: {error}") from None
    for document in documents:
        if isinstance(document.get("available_node_types"), dict):
            return document
        if document.get("provider", {}).get("type") == "local":
            return {"available_node_types": {}}  # one's own machines: what is there is what there is
        if document.get("kind") in ("RayCluster", "RayJob", "RayService"):
            return _kuberay_node_types(document, path)
    raise ConfigError(f"{path} is neither a Ray launcher config (available_node_types) nor a KubeRay manifest")


def knock(host: str, port: int, name: str) -> None:
    """Raises `InfrastructureError` at once where nobody listens; Ray's own clients wait for minutes."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        raise InfrastructureError(f"no Ray answers at {name}: {error.strerror or error}; is the cluster up?") from None


@contextlib.contextmanager
def token_refusals_explained(name: str) -> Iterator[None]:
    """Turns Ray's several ways to refuse a token into one sentence with the way out."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except RayError as error:
        # the dashboard tells a wrong token from none, the control service does not
        by_control_service = "InvalidAuthToken" in str(error)
        if not isinstance(error, AuthenticationError) and not by_control_service:
            raise
        wrong = "invalid or incorrect" in str(error) or (by_control_service and is_token_auth_enabled())
        told = "refuses the token that it was shown" if wrong else "asks for a token, and none was shown"
        raise ConfigError(f"the Ray cluster at {name} {told}: {TOKEN_HELP}") from None


def _kuberay_node_types(document: dict[str, Any], path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    spec = document.get("spec", {})
    spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    try:
        kinds = _generate_available_node_types_from_ray_cr_spec({"workerGroupSpecs": [], **spec})
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: its groups cannot be read: {error}") from None
    if not spec.get("enableInTreeAutoscaling"):
        kinds = {}
    return {"available_node_types": kinds}


def _this_machine() -> Node:
    from ray._private.accelerators import get_accelerator_manager_for_resource

    there = {"GPU": float(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())}
    return Node("this machine", total=there, free=there)


def _ask_gcs(address: str) -> tuple[tuple[Node, ...], dict[str, Any] | None]:
    """Nodes as the head's control service knows them, and the node types where an autoscaler has reported them."""
    use_token()
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RayError

    try:
        gcs = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise InfrastructureError(f"no Ray is found at resources.address={address}: {error}") from None
    host, _, port = gcs.rpartition(":")
    knock(host, int(port), f"resources.address={address}")
    try:
        with token_refusals_explained(address):
            status = get_cluster_status(gcs, timeout=ANSWER_S)
            reported = _reported(gcs)
    except RayError as error:
        raise InfrastructureError(f"the Ray cluster at {address} does not answer: {error}") from None
    nodes = tuple(
        Node(
            # a node that no autoscaler made is a type of its own
            "" if node.ray_node_type_name == f"node_{node.node_id}" else node.ray_node_type_name,
            total=node.total_resources(),
            free=node.available_resources(),
        )
        for node in [*status.active_nodes, *status.idle_nodes]
    )
    return nodes, reported


def _reported(gcs: str) -> dict[str, Any] | None:
    """The node types that an autoscaler wrote into the control service, in a launcher config's form."""
    import ray._raylet
    from ray.core.generated import autoscaler_pb2

    space, key = ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE, ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY
    stored = ray._raylet.GcsClient(gcs).internal_kv_get(key.encode(), namespace=space.encode(), timeout=ANSWER_S)
    if not stored:
        return None
    groups = autoscaler_pb2.ClusterConfig.FromString(stored).node_group_configs
    kinds = {
        group.name: {
            "resources": dict(group.resources),
            **({"max_workers": group.max_count} if group.max_count >= 0 else {}),
        }
        for group in groups
    }
    return {"available_node_types": kinds} if kinds else None


def _ask_dashboard(address: str) -> tuple[Node, ...]:
    use_token()
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    parts = urlsplit(address)
    knock(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), address)
    with token_refusals_explained(address):
        try:
            found = list_nodes(address=address, filters=[("state", "=", "ALIVE")], limit=10_000, timeout=ANSWER_S)
        except RayStateApiException as error:
            raise InfrastructureError(f"the dashboard at {address} does not tell its nodes: {error}") from None
    # what is free it does not tell
    return tuple(Node(node.labels.get(GROUP_LABEL, ""), node.resources_total, node.resources_total) for node in found)
