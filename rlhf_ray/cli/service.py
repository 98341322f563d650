"""`rlhf serve`, `rlhf keys`, `rlhf policies`: what answers over HTTP, and to whom."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from datetime import datetime

    from rlhf_ray.models.registry import Registry
    from rlhf_ray.serving.auth import KeyStore

app = typer.Typer()
keys_app = typer.Typer(
    help="Who may ask a service: keys with roles.\n\n"
    "app: answers and rewards. annotator: sends feedback. trainer: reads feedback too. admin: everything.\n\n"
    "Until the first key is made, a service answers its own machine only; from then on nobody without a key. "
    "A running service takes new and revoked keys at once.",
    no_args_is_help=True,
)
policies_app = typer.Typer(
    help="Published versions: list, promote, roll back.\n\n"
    "A running service takes a promoted version without a restart: its replicas swap one by one, and where one cannot, "
    "the old version stays.",
    no_args_is_help=True,
)
app.add_typer(keys_app, name="keys")
app.add_typer(policies_app, name="policies")

RegistryFolder = Annotated[Path, typer.Option("--registry", help="Folder of the published versions.")]
KeysFile = Annotated[str, typer.Option("--keys", help="The service's keys: a file, or sqlite:///its/path.")]
KeyName = Annotated[str, typer.Argument(help="A name, such as phone-app or ann-3.")]
REGISTRY, KEYS = Path("service/registry"), "service/keys.db"


class ModelKind(StrEnum):
    """What is published."""

    POLICY = "policy"
    REWARD_MODEL = "reward_model"


Kind = Annotated[ModelKind, typer.Option("--kind", help="Of which kind of model.")]


class KeyRole(StrEnum):
    """What a key is good for."""

    APP = "app"
    ANNOTATOR = "annotator"
    TRAINER = "trainer"
    ADMIN = "admin"


@app.command()
def serve(
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="A run folder, such as runs/demo; without it, what the registry holds is served."),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Settings of the service: policy.replicas=2 limits.concurrent=8 parts=[policy,feedback]"),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The service's port.", min=1, max=65535)] = 8000,
    registry: RegistryFolder = REGISTRY,
    store: Annotated[str, typer.Option("--store", help="Where feedback and served answers are kept.")] = (
        "service/feedback.db"
    ),
    keys: KeysFile = KEYS,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--address", help="A Ray cluster to run on (auto, HOST:PORT); without it one is started here."),
    ] = None,
) -> None:
    """Answer over HTTP: the policy, the reward model and feedback, until Ctrl-C.

    The run's models become versions in the registry, if they are not there yet; the first of a kind is promoted. Which
    version is served after that is yours to say: `rlhf policies promote`.
    """
    from rlhf_ray.serving.settings import config_of

    if run is not None and "=" in str(run):  # an override, where no run was given
        run, overrides = None, [str(run), *(overrides or [])]
    options = {"host": host, "port": port, "registry": str(registry), "store": store, "keys": keys}
    config = config_of(options, overrides or [])
    from rlhf_ray.serving.start import prepare, serve_until_stopped

    prepare(run, config, say=typer.echo)
    serve_until_stopped(config, address=address, say=typer.echo)


@keys_app.command("create")
def keys_create(
    name: KeyName,
    role: Annotated[KeyRole, typer.Option("--role", help="What it is good for.")],
    keys: KeysFile = KEYS,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from rlhf_ray.serving.auth import KeyStore
    from rlhf_ray.sqlite import file_of

    file_of(keys, what="keys").parent.mkdir(parents=True, exist_ok=True)
    key = KeyStore(keys).create(name, role.value)
    typer.echo(f"role {role.value}; keep it, it is not shown again. Send it as 'Authorization: Bearer KEY'.", err=True)
    typer.echo(key)


@keys_app.command("list")
def keys_list(keys: KeysFile = KEYS) -> None:
    """Every key that was made, by name: role, first characters, when it was made, used and revoked."""
    typer.echo(f"{'name':<24}{'role':<12}{'begins':<16}{'made':<18}{'used':<18}revoked")
    for key in _key_store(keys).listed():
        moments = [f"{_moment(moment):<18}" for moment in (key.created_at, key.last_used_at, key.revoked_at)]
        typer.echo(f"{key.name:<24}{key.role:<12}rlhf_{key.prefix:<11}{''.join(moments)}".rstrip())


@keys_app.command("revoke")
def keys_revoke(name: KeyName, keys: KeysFile = KEYS) -> None:
    """Shut a key out, from the next request on."""
    _key_store(keys).revoke(name)
    typer.echo(f"{name} is revoked")


@policies_app.command("list")
def policies_list(registry: RegistryFolder = REGISTRY, kind: Kind = ModelKind.POLICY) -> None:
    """Every version: where it comes from, what it scored, and which one is promoted (*)."""
    opened = _registry(registry)
    promoted = opened.promoted(kind.value)
    failed = {line.number: line.reason for line in opened.history(kind.value) if line.state == "failed"}
    typer.echo(f"  {'number':<8}{'published':<18}{'run':<20}{'step':<8}{'sha256':<14}reward, gold before > after")
    for version in opened.versions(kind.value):
        mark = "*" if promoted and promoted.number == version.number else " "
        known = version.lineage
        origin = f"{known.get('run_id') or '-':<20}{_shown(known.get('step')):<8}"
        line = f"{mark} {version.number:<8}{_moment(version.created_at):<18}{origin}{version.sha256[:12]:<14}"
        typer.echo(f"{line}{_scores(known)}")
        if version.number in failed and mark == " ":
            typer.echo(f"    could not be served: {failed[version.number]}")


@policies_app.command("promote")
def policies_promote(
    which: Annotated[str, typer.Argument(help="A version's number, or a run folder to publish and promote.")],
    registry: RegistryFolder = REGISTRY,
    kind: Kind = ModelKind.POLICY,
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Even a reward model that is not surely better than no model.")
    ] = False,
) -> None:
    """Make a version the one that is served. Its files are verified first."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.serving.start import publish_run, whoami

    if which.isdecimal():
        opened, number = _registry(registry), int(which)
    else:
        from rlhf_ray.models.registry import Registry

        opened = Registry(registry)
        published = publish_run(Path(which), opened, by=whoami())
        if kind.value not in published:
            raise InputError(f"{which} has no {kind.value.replace('_', ' ')}")
        number = published[kind.value].number
    opened.promote(kind.value, number, by=whoami(), reason=reason, force=force)
    typer.echo(f"{kind.value.replace('_', ' ')} {number} is promoted")


@policies_app.command("rollback")
def policies_rollback(registry: RegistryFolder = REGISTRY, kind: Kind = ModelKind.POLICY) -> None:
    """Promote anew what was served before. Twice is back where it was."""
    from rlhf_ray.serving.start import whoami

    version = _registry(registry).rollback(kind.value, by=whoami())
    typer.echo(f"{kind.value.replace('_', ' ')} {version.number} is promoted again")


def _registry(folder: Path) -> "Registry":
    """A registry that is there: looking at none should not make one."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.models.registry import Registry

    if not (folder / "registry.db").is_file():
        raise InputError(f"no registry at {folder}: give --registry, or publish with `rlhf policies promote RUN`")
    return Registry(folder)


def _key_store(url: str) -> "KeyStore":
    """Keys that are there: looking at none should not make a file."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.serving.auth import KeyStore
    from rlhf_ray.sqlite import file_of

    if not file_of(url, what="keys").is_file():
        raise InputError(f"no keys at {url}: give --keys, or make one with `rlhf keys create`")
    return KeyStore(url)


def _moment(moment: "datetime | None") -> str:
    return moment.strftime("%Y-%m-%d %H:%M") if moment else "-"


def _scores(lineage: dict[str, Any]) -> str:
    evaluation = lineage.get("evaluation") or {}
    pairs = [evaluation.get(name) or {} for name in ("reward", "gold")]
    return ", ".join(f"{_shown(pair.get('before'))} > {_shown(pair.get('after'))}" for pair in pairs)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
