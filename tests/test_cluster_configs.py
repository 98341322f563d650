"""The configs in cluster/ start what they say, and every kind of mistake in one of them is caught.

Ray's launcher configs are held against Ray's own schema and prepare step, KubeRay's manifests against the resource
definitions of its operator, made strict; both against the resource names that the roles ask for.
"""

import copy
import gzip
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from rlhf_ray.clusters import Node, growth, node_types
from rlhf_ray.config import load_config
from rlhf_ray.plan import asks_of, plan
from rlhf_ray.roles.seats import SEATS, SERVING_SEAT

ROOT = Path(__file__).parent.parent
CRDS = ROOT.parent / "shared" / "data" / "kuberay-crds"
LAUNCHER = sorted((ROOT / "cluster").glob("*.yaml"))
CLOUDS = [path for path in LAUNCHER if path.stem != "onprem"]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("ray*.yaml"))
TRAINING = [*CLOUDS, *(path for path in KUBERAY if path.stem != "rayservice")]
SEAT_NAMES = {*SEATS.values(), SERVING_SEAT}
KNOWN_FLAGS = {option for parameter in start.params for option in parameter.opts}
NODE_CONFIG = {"aws": {"InstanceType", "ImageId"}, "gcp": {"machineType", "disks"}, "azure": {"azure_arm_parameters"}}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A definition's schema as JSON schema in which a field that is not named is an error."""
    made = {
        key: value
        for key, value in schema.items()
        if not key.startswith("x-") and key not in ("description", "format", "default", "nullable")
    }
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if "properties" in schema:
        made["properties"] = {name: strict(child) for name, child in schema["properties"].items()}
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        defaulted = {name for name, child in schema["properties"].items() if "default" in child}
        made["required"] = [name for name in schema.get("required", []) if name not in defaulted]
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


@cache
def definition(kind: str) -> dict[str, Any]:
    """The strict schema of RayCluster, RayJob or RayService."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not file.is_file():
        pytest.skip(
            "no ../shared/data/kuberay-crds beside the project: manifests not held against KubeRay's definitions"
        )
    with gzip.open(file, "rt", encoding="utf-8") as text:
        versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    return strict(schema)


def problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with a config, launcher's or KubeRay's; nothing for a good one."""
    return list(_manifest_problems(config) if "kind" in config else _launcher_problems(config))


def _launcher_problems(config: dict[str, Any]) -> Iterator[str]:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError, KeyError, TypeError) as error:
        yield f"Ray refuses it: {str(error).splitlines()[0]}"
        return
    kinds = config.get("available_node_types", {})
    for name, kind in kinds.items():
        yield from _group_problems(name, kind["resources"], kind.get("min_workers", 0), kind.get("max_workers", 0))
        missing = NODE_CONFIG[config["provider"]["type"]] - set(kind["node_config"])
        if missing:
            yield f"{name} lacks {missing}"
    for when in ("head", "worker"):
        yield from _start_problems(config[f"{when}_start_ray_commands"], is_head=when == "head")
    if "/home/ray/.ray/auth_token" not in config.get("file_mounts", {}):
        yield "the token does not reach the machines"
    if "-v /shared:/shared" not in config["docker"]["run_options"]:
        yield "no shared storage"


def _start_problems(commands: list[str], *, is_head: bool) -> Iterator[str]:
    (command,) = (command for command in commands if "ray start" in command)
    words = shlex.split(command)
    flags = [word.partition("=") for word in words if word.startswith("--")]
    unknown = {flag for flag, _, _ in flags} - KNOWN_FLAGS
    if unknown:
        yield f"ray start does not know {unknown}"
    if "RAY_AUTH_MODE=token" not in words or not any(word.startswith("RAY_AUTH_TOKEN_PATH=") for word in words):
        yield "no token"
    if is_head and ("--dashboard-host", "=", "127.0.0.1") not in flags:
        yield "the dashboard is open"
    if is_head and not any(word.startswith("RAY_JOB_STOP_WAIT_TIME_S=") for word in words):
        yield "a stopped job is killed before it can save"


def _manifest_problems(config: dict[str, Any]) -> Iterator[str]:
    errors = list(jsonschema.Draft7Validator(definition(config["kind"])).iter_errors(config))
    yield from (f"{'.'.join(map(str, error.absolute_path))}: {error.message[:100]}" for error in errors)
    if errors:
        return
    spec = config["spec"].get("rayClusterSpec") or config["spec"].get("rayClusterConfig") or config["spec"]
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "no token"
    if not spec.get("enableInTreeAutoscaling"):
        yield "it does not grow"
    head = spec["headGroupSpec"]
    inside = config["kind"] == "RayCluster"  # the operator itself talks to the dashboard of the two others
    if head["rayStartParams"]["dashboard-host"] != ("127.0.0.1" if inside else "0.0.0.0"):
        yield "the dashboard is open, or the operator cannot reach it"
    if head["serviceType"] != "ClusterIP":
        yield "the head is open"
    for group in spec["workerGroupSpecs"]:
        amounts = {name: int(amount) for name, amount in group["resources"].items()}
        yield from _group_problems(group["groupName"], amounts, group["minReplicas"], group["maxReplicas"])
    for pod in (part["template"]["spec"] for part in [head, *spec["workerGroupSpecs"]]):
        if not pod["securityContext"].get("runAsNonRoot"):
            yield "a pod may run as root"
        if not any(
            volume.get("persistentVolumeClaim", {}).get("claimName") == "rlhf-shared" for volume in pod["volumes"]
        ):
            yield "no shared storage"


def _group_problems(name: str, amounts: dict[str, int], least: int, most: int) -> Iterator[str]:
    expected = {
        "head": set(),
        "learner": {SEATS["learner"], SEATS["scorer"]},
        "generator": {SEATS["generator"]},
        "serving": {SERVING_SEAT},
    }[name]
    seats = {resource for resource in amounts if resource not in ("CPU", "GPU")}
    if seats != expected:
        yield f"{name} declares {seats or 'nothing'}, and its roles ask for {expected}"
    if name == "head":
        if amounts["CPU"] != 0:
            yield "roles may land on the head"
        return
    if not amounts.get("GPU"):
        yield f"{name} has no GPU"
    if name == "generator" and (least != 0 or most < 2):
        yield "generators do not grow from 0"
    if name == "serving" and least < 2:
        yield "one machine alone serves"


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=name_of)
def test_nothing_is_wrong_with_it(path: Path) -> None:
    assert problems(read(path)) == []


def test_there_is_one_for_each_cloud_for_own_machines_and_for_each_kind_of_kuberay() -> None:
    assert {path.stem for path in LAUNCHER} == {"aws", "gcp", "azure", "onprem"}
    assert {path.stem for path in KUBERAY} == {"raycluster", "rayjob", "rayservice"}


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_the_run_config_for_clusters_fits_it_while_it_is_still_empty(path: Path) -> None:
    config = load_config(ROOT / "deployments" / "jobs" / "cluster.yaml")
    head = Node("head", {"CPU": 0.0}, {"CPU": 0.0})
    found = plan(asks_of(config), [head], growth(node_types(path), (head,)))
    assert found.lacks == ()
    assert {row.ask.role: row.grows for row in found.rows} == {"generator": 8, "scorer": 3, "learner": 1}


def test_the_names_are_those_that_pinned_roles_ask_for() -> None:
    asked = {name for ask in asks_of(load_config(None, ["resources.pin_roles=true"])) for name in ask.each}
    declared = {
        name
        for path in CLOUDS
        for kind in read(path)["available_node_types"].values()
        for name in kind["resources"]
    }  # fmt: skip
    assert declared == asked | {SERVING_SEAT}
    written = set(re.findall(r"rlhf_[a-z]+", (ROOT / "cluster" / "onprem.yaml").read_text())) - {"rlhf_ray"}
    assert written == SEAT_NAMES


def test_only_ssh_is_let_in_from_outside() -> None:
    rules = read(ROOT / "cluster" / "aws.yaml")["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=name_of)
def test_what_a_reader_must_set_is_named_at_the_top(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    top = text[: next(match.start() for match in re.finditer(r"^[^#\n]", text, re.MULTILINE))]
    body = re.sub(r"#.*", "", text[len(top) :])
    placeholders = set(re.findall(r"\b(?:IMAGE|FILE_SYSTEM|YOUR_NETWORK|AMI|PROJECT|HEAD|WORKER_\d|SSH_USER)\b", body))
    assert "IMAGE" in placeholders
    assert not {name for name in placeholders if not re.search(rf"\b{name}\b", top)}


def test_the_service_that_kuberay_starts_is_a_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(read(ROOT / "cluster" / "kuberay" / "rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "rlhf_ray.serving.app:build"
    settings = pytest.importorskip("rlhf_ray.serving.settings")
    settings.service_config(application.args)


def test_the_run_that_kuberay_starts_is_a_command_of_ours() -> None:
    command = read(ROOT / "cluster" / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"].split()
    assert command[:3] == ["rlhf", "run", "-c"]
    load_config(None, command[4:])


def at(config: dict[str, Any], path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        found = found[int(key) if key.isdigit() else key]
    return found


def renamed(path: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def plant(config: dict[str, Any]) -> None:
        place = at(config, path) if path else config
        place[new] = place.pop(old)

    return plant


def changed(path: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: at(config, path).__setitem__(key, value) if path else config.__setitem__(key, value)


def without(path: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: at(config, path).pop(key) if path else config.pop(key)


def in_commands(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def plant(config: dict[str, Any]) -> None:
        for when in ("head", "worker"):
            key = f"{when}_start_ray_commands"
            config[key] = [command.replace(old, new) for command in config[key]]

    return plant


GENERATOR = "available_node_types.generator"
PLANTED_IN_LAUNCHER = {
    "typo in a field": renamed("", "max_workers", "max_wokers"),
    "typo in a node type": renamed(GENERATOR, "min_workers", "min_worker"),
    "wrong type": changed(GENERATOR, "max_workers", "eight"),
    "missing required": without(GENERATOR, "resources"),
    "missing provider": without("", "provider"),
    "head type that is none": changed("", "head_node_type", "heads"),
    "wrong resource name": renamed(f"{GENERATOR}.resources", "rlhf_generator", "generator"),
    "no token": in_commands("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
    "token not carried": changed("", "file_mounts", {}),
    "open dashboard": in_commands("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    "typo in a flag": in_commands("--dashboard-host", "--dashbord-host"),
    "no time to save": in_commands("RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_STOP_WAIT"),
    "no GPU": changed(f"{GENERATOR}.resources", "GPU", 0),
    "generators that stay": changed(GENERATOR, "min_workers", 1),
    "work on the head": changed("available_node_types.head.resources", "CPU", 4),
    "no machine named": changed(GENERATOR, "node_config", {}),
    "no shared storage": changed("docker", "run_options", []),
}
WORKER = "spec.workerGroupSpecs.1"
PLANTED_IN_KUBERAY = {
    "typo in a field": renamed("spec", "enableInTreeAutoscaling", "enableInTreeAutoScaling"),
    "typo deep down": renamed(f"{WORKER}.template.spec.containers.0", "image", "imgae"),
    "wrong type": changed(WORKER, "maxReplicas", "8"),
    "missing required": without(WORKER, "groupName"),
    "missing head": without("spec", "headGroupSpec"),
    "wrong word": changed("spec.authOptions", "mode", "tokens"),
    "wrong resource name": renamed(f"{WORKER}.resources", "rlhf_generator", "generator"),
    "no token": without("spec", "authOptions"),
    "token off": changed("spec.authOptions", "mode", "disabled"),
    "open dashboard": changed("spec.headGroupSpec.rayStartParams", "dashboard-host", "0.0.0.0"),
    "open head": changed("spec.headGroupSpec", "serviceType", "LoadBalancer"),
    "generators that stay": changed(WORKER, "minReplicas", 1),
    "root": changed(f"{WORKER}.template.spec", "securityContext", {}),
    "no shared storage": changed(f"{WORKER}.template.spec", "volumes", []),
    "no autoscaler": changed("spec", "enableInTreeAutoscaling", False),
}


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
@pytest.mark.parametrize("mistake", PLANTED_IN_LAUNCHER)
def test_a_mistake_in_a_launcher_config_is_caught(path: Path, mistake: str) -> None:
    config = read(path)
    PLANTED_IN_LAUNCHER[mistake](config)
    assert problems(config)


@pytest.mark.parametrize("mistake", PLANTED_IN_KUBERAY)
def test_a_mistake_in_a_manifest_is_caught(mistake: str) -> None:
    config = read(ROOT / "cluster" / "kuberay" / "raycluster.yaml")
    PLANTED_IN_KUBERAY[mistake](config)
    assert problems(config)


def test_the_image_does_not_run_as_root_and_pipes_nothing_from_the_net_into_a_shell() -> None:
    lines = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (\S+)", lines, re.MULTILINE) == ["ray"]
    assert not re.search(r"(curl|wget)[^\n]*\|", lines)


def test_ones_own_machines_say_themselves_what_they_are_for() -> None:
    text = (ROOT / "cluster" / "onprem.yaml").read_text(encoding="utf-8")
    examples = [json.loads(found) for found in re.findall(r"\{\"rlhf.*?\}", text)]
    assert {name for example in examples for name in example} == SEAT_NAMES
    assert '--resources="$(cat /etc/rlhf/resources.json)"' in text
