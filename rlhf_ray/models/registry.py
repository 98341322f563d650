"""Published policies and reward models: numbered, immutable, each with its lineage, and which of them is wanted.

A version is a folder that was copied whole, loaded once and hashed file by file before it got its number; what a crash
leaves behind has no row and is no version. Promotions are a table that only grows: what is wanted is the latest
promotion that did not fail. Several processes may publish and promote at once.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Column, Connection, Integer, MetaData, Row, Table, Text, insert, select

from rlhf_ray.errors import InfrastructureError, InputError, ModelError
from rlhf_ray.models.files import fsync, members_of, read_folder
from rlhf_ray.sqlite import Database, append_only

Kind = Literal["policy", "reward_model"]
State = Literal["promoted", "failed"]
FOLDERS: dict[Kind, str] = {"policy": "policies", "reward_model": "reward_models"}
COPIED = {".safetensors", ".json", ".txt", ".jinja", ".md"}
"""Suffixes of what a version holds: weights and text, nothing that could run."""
MANIFEST = "manifest.json"
CHUNK = 1 << 20

metadata = MetaData()
_versions = Table(
    "versions",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("lineage", Text, nullable=False),
    Column("created_at", Text, nullable=False),
)
_promotions = Table(
    "promotions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("of", Integer, nullable=True),  # the promotion that a `failed` row takes back
    Column("at", Text, nullable=False),
)
append_only(_versions)
append_only(_promotions)


@dataclass(frozen=True, slots=True)
class Version:
    """A published model. Its number is never given to anything else."""

    kind: Kind
    number: int
    folder: Path
    sha256: str
    """Over the names and sha256 of its files: two versions of one kind never share it."""
    lineage: dict[str, Any]
    """Where it comes from: run, step, config, feedback snapshot, reward model, gate, evaluation."""
    created_at: datetime

    @property
    def not_good_enough(self) -> str:
        """Why a reward model should not be trusted, in words: its run's gate let it not pass. Empty where it may."""
        gate = self.lineage.get("gate") if self.kind == "reward_model" else None
        if not gate or gate["passed"]:
            return ""
        if gate["better_by"] is None:
            return "none of the judgements held out compare two answers, so nothing shows that it beats no model"
        low, high = gate["better_by_ci95"]
        return (
            f"it is not surely better than no model: on held-out choices {gate['better_by']:+.3f} [{low:+.3f}, "
            f"{high:+.3f}] beside '{gate['baseline']}', which is right in {gate['baseline_accuracy']:.3f}"
        )


@dataclass(frozen=True, slots=True)
class Promotion:
    """A line of the history: that a version was wanted, or that a promotion failed."""

    id: int
    kind: Kind
    number: int
    by: str
    reason: str
    state: State
    of: int | None
    at: datetime


class Registry:
    """The versions under one folder. Example: `Registry(Path("registry")).promoted("policy")`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            for folder in FOLDERS.values():
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make a registry at {root} ({error.strerror}): name another folder") from None
        self._database = Database(self.root / "registry.db", metadata, what="registry")

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def publish(self, kind: Kind, folder: Path, *, lineage: Mapping[str, Any]) -> Version:
        """A copy of a Hugging Face folder as the next version; the same files again are the version they were.

        `ModelError` for what cannot be served: links, code of its own, what does not load or is not finite.
        """
        from rlhf_ray.models.soundness import refuse_unusable  # brings torch, which only publishing needs

        origin = json.dumps(dict(lineage), sort_keys=True, ensure_ascii=False, allow_nan=False)
        kept = self.root / FOLDERS[kind]
        new = kept / f".new-{secrets.token_hex(6)}"
        try:
            files = _copy(folder, new, kind)
            refuse_unusable(new, kind)
            _write_manifest(new / MANIFEST, files)
            return self._number(kind, new, _sha256(files), origin)
        except OSError as error:
            raise InfrastructureError(f"cannot publish into {self.root}: {error.strerror}") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _number(self, kind: Kind, new: Path, sha256: str, lineage: str) -> Version:
        with self._database.writing() as connection:
            rows = connection.execute(select(_versions).where(_versions.c.kind == kind)).all()
            for row in rows:
                if row.sha256 == sha256:
                    return self._version(row)
            number = max((row.number for row in rows), default=0) + 1
            target = self._folder(kind, number)
            # no row has this number, so a folder that has it is a crash's: it was renamed and never committed
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
            fsync(target.parent)
            row_values = {"kind": kind, "number": number, "sha256": sha256, "lineage": lineage, "created_at": _now()}
            connection.execute(insert(_versions), row_values)
        return self.version(kind, number)

    def versions(self, kind: Kind) -> list[Version]:
        """All of a kind, oldest first."""
        query = select(_versions).where(_versions.c.kind == kind).order_by(_versions.c.number)
        with self._database.reading() as connection:
            return [self._version(row) for row in connection.execute(query)]

    def version(self, kind: Kind, number: int) -> Version:
        """The version of a number; `InputError` lists those that there are."""
        found = {version.number: version for version in self.versions(kind)}
        if number not in found:
            listed = ", ".join(map(str, found)) or "none yet"
            raise InputError(f"no {_word(kind)} {number} in registry {self.root}; there are: {listed}")
        return found[number]

    def verify(self, version: Version) -> None:
        """`ModelError` where a file of a version is not, byte for byte, what was published, or is one more."""
        verify(version)

    def promote(self, kind: Kind, number: int, *, by: str, reason: str = "", force: bool = False) -> None:
        """Makes a version the one that is wanted; its files are verified first.

        `InputError` for a reward model that is not surely better than no model (`gate`), unless forced.
        """
        version = self.version(kind, number)
        if not force and (why := version.not_good_enough):
            raise InputError(
                f"{_word(kind)} {number} is not promoted: {why}; give it more feedback, or promote it all the same "
                f"with `rlhf policies promote {number} --kind {kind} --force`"
            )
        self.verify(version)
        with self._database.writing() as connection:
            _append(connection, kind=kind, number=number, by=by, reason=reason, state="promoted", of=None)

    def rollback(self, kind: Kind, *, by: str) -> Version:
        """Promotes anew what was wanted before, and returns it. Twice is back where it was."""
        standing = self._standing(kind)
        earlier = [row.number for row in standing if row.number != standing[-1].number]
        if not earlier:
            raise InputError(f"no {_word(kind)} was promoted before the one that is: there is nothing to go back to")
        self.promote(kind, earlier[-1], by=by, reason=f"rollback of {standing[-1].number}", force=True)
        return self.version(kind, earlier[-1])

    def fail(self, kind: Kind, number: int, *, reason: str, by: str = "service") -> None:
        """Takes back the latest promotion of a version that could not be served; the one before is wanted again."""
        with self._database.writing() as connection:
            of = [row.id for row in _still_standing(connection, kind) if row.number == number]
            if of:  # else somebody was faster
                _append(connection, kind=kind, number=number, by=by, reason=reason, state="failed", of=of[-1])

    def promoted(self, kind: Kind) -> Version | None:
        """The version that is wanted, None before the first promotion."""
        standing = self._standing(kind)
        return self.version(kind, standing[-1].number) if standing else None

    def history(self, kind: Kind) -> list[Promotion]:
        """Promotions and failures, oldest first."""
        with self._database.reading() as connection:
            return _history(connection, kind)

    def _standing(self, kind: Kind) -> list[Promotion]:
        with self._database.reading() as connection:
            return _still_standing(connection, kind)

    def _folder(self, kind: Kind, number: int) -> Path:
        return self.root / FOLDERS[kind] / f"{number:08d}"

    def _version(self, row: Row[Any]) -> Version:
        made = datetime.fromisoformat(row.created_at)
        folder = self._folder(row.kind, row.number)
        return Version(row.kind, row.number, folder, row.sha256, json.loads(row.lineage), made)


def verify(version: Version) -> None:
    """`ModelError` where a file of a version is not, byte for byte, what was published, or is one more."""
    advice = "restore it from a copy, or promote another version"
    broken = f"{_word(version.kind)} {version.number}"
    try:
        listed = json.loads((version.folder / MANIFEST).read_bytes())["files"]
        found = {name: _hash(version.folder / name) for name in _names(version.folder) if name != MANIFEST}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{broken} cannot be read ({type(error).__name__}): {advice}") from None
    if found != listed or _sha256(found) != version.sha256:
        wrong = sorted(name for name in {*found, *listed} if found.get(name) != listed.get(name)) or [MANIFEST]
        raise ModelError(f"{broken} was changed after it was published ({', '.join(wrong)}): {advice}")


def _append(connection: Connection, **values: Any) -> None:
    connection.execute(insert(_promotions), {**values, "at": _now()})


def _history(connection: Connection, kind: Kind) -> list[Promotion]:
    query = select(_promotions).where(_promotions.c.kind == kind).order_by(_promotions.c.id)
    return [
        Promotion(row.id, row.kind, row.number, row.by, row.reason, row.state, row.of, datetime.fromisoformat(row.at))
        for row in connection.execute(query)
    ]


def _still_standing(connection: Connection, kind: Kind) -> list[Promotion]:
    """The promotions that no later row took back, oldest first; the last is the one that counts."""
    rows = _history(connection, kind)
    taken_back = {row.of for row in rows}
    return [row for row in rows if row.state == "promoted" and row.id not in taken_back]


def _copy(folder: Path, new: Path, kind: Kind) -> dict[str, str]:
    """The files that belong to a version, copied to the disk, with their sha256."""
    files = {}
    for place in members_of(folder) if kind == "reward_model" else [folder]:
        if place != folder:
            _refuse_link(place, kind)
        read_folder(place, _word(kind))
        target = new / place.relative_to(folder)
        target.mkdir(parents=True)
        for source in sorted(place.iterdir()):
            _refuse_link(source, kind)
            if source.suffix in COPIED and source.is_file() and source.name != MANIFEST:
                files[str(source.relative_to(folder))] = _copy_file(source, target / source.name)
        fsync(target)
        fsync(target.parent)
    return files


def _refuse_link(source: Path, kind: Kind) -> None:
    if source.is_symlink():
        raise ModelError(f"{source} is a link: copy the {_word(kind)} with its files (cp -rL) and publish the copy")


def _names(folder: Path) -> list[str]:
    """Of whatever a version holds, from its folder on; what is no file will not be read."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _copy_file(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    # not followed: a link that took the file's place after it was looked at is an error, not a way out of the folder
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file, target.open("xb") as copy:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fchmod(copy.fileno(), 0o444)
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _write_manifest(path: Path, files: Mapping[str, str]) -> None:
    with path.open("x") as file:
        json.dump({"files": dict(files)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    fsync(path.parent)


def _hash(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def _word(kind: Kind) -> str:
    return kind.replace("_", " ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
