"""`rlhf`: the door. Imports happen inside commands, so that `rlhf --help` answers at once."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from rlhf_ray import __version__

if TYPE_CHECKING:
    from datetime import datetime

    from rlhf_ray.config import Config
    from rlhf_ray.models.registry import Registry
    from rlhf_ray.serving.auth import KeyStore
    from rlhf_ray.training.stages import Stage

app = typer.Typer(
    name="rlhf",
    help="People's feedback on a language model's answers, turned into a better model.\n\n"
    "Start with `rlhf demo`. Every training command takes -c FILE.yaml and dotted overrides such as "
    "ppo.kl.coef=0.05; the same command on the same run folder resumes.\n\n"
    "Exit codes: 0 done, 2 configuration or input, 3 no valid checkpoint, 4 diverged, "
    "5 infrastructure (resumable), 130 interrupted, 143 terminated (both resumable).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at a configuration before it runs.", no_args_is_help=True)
feedback_app = typer.Typer(help="People's judgements: import, look at, freeze.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(feedback_app, name="feedback")
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

ConfigFile = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("-c", "--config", help="YAML file of settings; without it the built-in demo.", metavar="FILE.yaml"),
]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="Settings that win over the file: dotted.key=value")]  # noqa: UP045
Store = Annotated[str, typer.Option("--store", help="Database: sqlite:///path/feedback.db, or its path.")]
Run = Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.")]
RegistryFolder = Annotated[Path, typer.Option("--registry", help="Folder of the published versions.")]
KeysFile = Annotated[str, typer.Option("--keys", help="The service's keys: a file, or sqlite:///its/path.")]
KeyName = Annotated[str, typer.Argument(help="A name, such as phone-app or ann-3.")]
REGISTRY, KEYS = Path("service/registry"), "service/keys.db"


class Format(StrEnum):
    """How a file of human choices is written."""

    HH = "hh"
    PAIRS = "pairs"


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


class By(StrEnum):
    """What feedback is counted by."""

    SAMPLER = "sampler"
    ANNOTATOR = "annotator"


@app.command()
def demo(overrides: Overrides = None) -> None:
    """The whole loop on an invented world in minutes: base policy, feedback, reward model, PPO, report."""
    _run(_load(None, ["run.id=demo", *(overrides or [])]), "ppo")


@app.command()
def run(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """All stages: base policy, feedback, reward model, PPO, evaluation, report. Resumes where it stopped."""
    _run(_load(config, overrides), "ppo")


@app.command()
def sft(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """The base policy alone: trained on text, then on demonstrations."""
    _run(_load(config, overrides), "base_policy")


@app.command()
def reward(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Up to the reward model: base policy, feedback, and a model of what people prefer."""
    _run(_load(config, overrides), "reward_model")


@app.command()
def ppo(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """PPO from a base policy and a reward model: this run's, those of `run.from`, or given folders."""
    _run(_load(config, overrides), "ppo")


@app.command(name="eval")
def evaluate(run: Run) -> None:
    """What a run's policy is worth on held-out prompts, as its summary.json says it."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.training.run_folder import existing_run

    folder, _ = existing_run(run)
    summary = folder.read_json("summary.json")
    if summary is None:
        raise InputError(f"{run} has not finished yet; run its command again to go on")
    _print_json(summary)


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html anew from the files in its folder."""
    from rlhf_ray.training.report import write_report

    typer.echo(write_report(run))


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
    opened.promote(kind.value, number, by=whoami(), reason=reason)
    typer.echo(f"{kind.value.replace('_', ' ')} {number} is promoted")


@policies_app.command("rollback")
def policies_rollback(registry: RegistryFolder = REGISTRY, kind: Kind = ModelKind.POLICY) -> None:
    """Promote anew what was served before. Twice is back where it was."""
    from rlhf_ray.serving.start import whoami

    version = _registry(registry).rollback(kind.value, by=whoami())
    typer.echo(f"{kind.value.replace('_', ' ')} {version.number} is promoted again")


@app.command()
def doctor() -> None:
    """Check this machine: Python, torch, vLLM, Ray, memory, disk."""
    from rlhf_ray.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        typer.echo(finding)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(2)


@config_app.command("show")
def config_show(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML."""
    from rlhf_ray.config import dump_config

    typer.echo(dump_config(_load(config, overrides)), nl=False)


@config_app.command("validate")
def config_validate(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Exit 0 if the configuration is one, 2 with the key at fault if not."""
    _load(config, overrides)
    typer.echo("valid")


@config_app.command("schema")
def config_schema() -> None:
    """Print every key with its type, default and meaning, as JSON schema."""
    from rlhf_ray.config import Config

    _print_json(Config.model_json_schema(by_alias=True))


@feedback_app.command("import")
def feedback_import(
    file: Annotated[Path, typer.Argument(help="JSON Lines, plain or gzip.")],
    store: Store,
    format: Annotated[Format, typer.Option("--format", help="How its rows are written.")] = Format.HH,
    skip_bad_rows: Annotated[bool, typer.Option(help="Skip and count rows that cannot be used.")] = False,
) -> None:
    """Write human choices from a file into a store, each as a ranking of two."""
    from rlhf_ray.feedback.formats import import_pairs, read_pairs
    from rlhf_ray.feedback.store import FeedbackStore

    pairs = read_pairs(file, format.value, "skip" if skip_bad_rows else "error")
    with FeedbackStore(store) as opened:
        before = opened.count()
        import_pairs(opened, pairs.pairs, annotator=f"import-{format}", sampler=f"import-{format}")
        typer.echo(f"{pairs.describe()}; {opened.count() - before} rows are new in {store}")


@feedback_app.command("stats")
def feedback_stats(
    store: Store,
    by: Annotated[Optional[By], typer.Option("--by", help="Only these tallies.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How much feedback a store holds: by kind, by who sampled the answers, by annotator."""
    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store, read_only=True) as opened:
        stats = opened.stats()
    tallies = {
        key: [{key: tally.name, "n": tally.n, "mean": tally.mean} for tally in getattr(stats, f"by_{key}")]
        for key in By
        if by in (None, key)
    }
    if as_json:
        _print_json(
            {"rows": stats.rows, "by_kind": stats.by_kind, **{f"by_{key}": rows for key, rows in tallies.items()}}
        )
        return
    kinds = ", ".join(f"{n} {kind}s" for kind, n in stats.by_kind.items()) or "nothing"
    typer.echo(f"{stats.rows} rows: {kinds}")
    for key, rows in tallies.items():
        typer.echo(f"{key:<24}{'n':>8}  mean rating")
        for row in rows:
            mean = "-" if row["mean"] is None else f"{row['mean']:.2f}"
            typer.echo(f"  {row[key]:<22}{row['n']:>8}  {mean:>11}")


@feedback_app.command("snapshot")
def feedback_snapshot(
    store: Store,
    name: Annotated[Optional[str], typer.Option(help="Its name; by default one is made.")] = None,  # noqa: UP045
) -> None:
    """Freeze what a store holds now: the set that a training run reads, with its hash."""
    from rlhf_ray.feedback.store import FeedbackStore

    with FeedbackStore(store) as opened:
        snapshot = opened.freeze(name)
    typer.echo(f"{snapshot.id}  {snapshot.rows} rows  sha256 {snapshot.sha256}")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """People's feedback on a language model's answers, turned into a better model."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """The console script: runs a command and turns our errors into one line and an exit code."""
    from rlhf_ray.errors import InputError, RunFailed

    try:
        app()
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except RunFailed as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)


def _load(config: Path | None, overrides: list[str] | None) -> "Config":
    from rlhf_ray.config import load_config

    return load_config(config, overrides or [])


def _run(config: "Config", until: "Stage") -> None:
    from rlhf_ray.training.stages import run_stages

    run_stages(config, until=until, say=lambda line: typer.echo(line))


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


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _scores(lineage: dict[str, Any]) -> str:
    evaluation = lineage.get("evaluation") or {}
    pairs = [evaluation.get(name) or {} for name in ("reward", "gold")]
    return ", ".join(f"{_shown(pair.get('before'))} > {_shown(pair.get('after'))}" for pair in pairs)


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
