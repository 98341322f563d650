"""Who asks, and what they may: bearer keys with roles, kept as hashes.

A key is shown once, when it is made. A request without a valid one gets nowhere, except from this machine as long as
no key was ever made: then whoever is on the machine is its administrator, as with any local program.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Protocol, get_args

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Column, Integer, MetaData, Row, Table, Text, insert, select, update

from rlhf_ray.errors import InfrastructureError, InputError
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.sqlite import Database, file_of

Role = Literal["app", "annotator", "trainer", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
_KEY = re.compile(r"rlhf_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_USE_NOTED_EVERY = timedelta(minutes=1)

metadata = MetaData()
_keys = Table(
    "keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prefix", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("last_used_at", Text, nullable=True),
    Column("revoked_at", Text, nullable=True),
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: a key's id and name, and what it may do."""

    id: str
    """Never given to another key."""
    name: str
    role: Role


LOCAL = Caller("local", "local", "admin")
"""Whoever asks from this machine while there are no keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is listed: everything but the key."""

    prefix: str
    name: str
    role: Role
    created_at: datetime
    last_used_at: datetime | None
    """To the minute."""
    revoked_at: datetime | None


class Keys(Protocol):
    """What the door asks of a store of keys."""

    def any(self) -> bool:
        """Whether a key was ever made."""

    def caller(self, key: str) -> Caller | None:
        """Who holds a key; None for one that is not valid."""


class KeyDesk(Protocol):
    """Where keys are made and revoked."""

    def create(self, name: str, role: str) -> str:
        """A new key, to be shown once; `InputError` for a name or role that cannot be."""

    def listed(self) -> list[Key]:
        """All keys that were ever made, oldest first."""

    def revoke(self, name: str) -> None:
        """Shuts a key out; `InputError` where there is none."""


class KeyStore:
    """Keys in one SQLite file, which the door reads while `rlhf keys` writes."""

    def __init__(self, url: str | Path) -> None:
        self._database = Database(file_of(url, what="keys"), metadata, what="keys file")
        self._database.path.chmod(0o600)
        self._any = False

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def create(self, name: str, role: str) -> str:
        """A new key, to be shown once: only its sha256 is kept."""
        if role not in ROLES:
            raise InputError(f"no role '{role}'; there are: {', '.join(ROLES)}")
        if not _NAME.fullmatch(name):
            raise InputError(f"key name '{name}': use small letters, digits, - _ and ., at most 64")
        prefix, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        key = f"rlhf_{prefix}_{secret}"
        row = {"prefix": prefix, "name": name, "role": role, "sha256": _sha256(key), "created_at": _text(_now())}
        with self._database.writing() as connection:
            if connection.execute(select(_keys.c.id).where(_keys.c.name == name)).first():
                raise InputError(f"there is, or was, a key called '{name}': choose another name")
            connection.execute(insert(_keys), row)
        return key

    def listed(self) -> list[Key]:
        """All keys that were ever made, oldest first."""
        with self._database.reading() as connection:
            return [_key(row) for row in connection.execute(select(_keys).order_by(_keys.c.id))]

    def revoke(self, name: str) -> None:
        """Shuts a key out, from the next request on."""
        with self._database.writing() as connection:
            done = connection.execute(
                update(_keys).where(_keys.c.name == name, _keys.c.revoked_at.is_(None)).values(revoked_at=_text(_now()))
            )
        if not done.rowcount:
            listed = ", ".join(key.name for key in self.listed() if key.revoked_at is None) or "none"
            raise InputError(f"no valid key called '{name}'; there are: {listed}")

    def any(self) -> bool:
        """Whether a key was ever made. Revoking the last one does not open the door again."""
        if not self._any:  # once true, always true: rows are never removed
            with self._database.reading() as connection:
                self._any = connection.execute(select(_keys.c.id).limit(1)).first() is not None
        return self._any

    def caller(self, key: str) -> Caller | None:
        """Who holds a key, compared in constant time; None where it is unknown or revoked."""
        shaped = _KEY.fullmatch(key)
        with self._database.reading() as connection:
            row = connection.execute(select(_keys).where(_keys.c.prefix == (shaped[1] if shaped else ""))).first()
        matches = hmac.compare_digest(_sha256(key), row.sha256 if row else "")
        if row is None or not matches or row.revoked_at is not None:
            return None
        self._note_use(row)
        return Caller(row.prefix, row.name, row.role)

    def _note_use(self, row: Row[tuple[str, ...]]) -> None:
        now = _now()
        if row.last_used_at and now - datetime.fromisoformat(row.last_used_at) < _USE_NOTED_EVERY:
            return
        try:
            with self._database.writing() as connection:
                connection.execute(update(_keys).where(_keys.c.id == row.id).values(last_used_at=_text(now)))
        except InfrastructureError:
            pass  # a full disk keeps nobody from asking; the next request notes it


def role(*roles: Role) -> "Gate":
    """The dependency that lets these roles into a route, and administrators everywhere.

    Example: `@router.post("/v1/feedback")` with `caller: Annotated[Caller, Depends(role("annotator"))]`.
    """
    assert set(roles) <= set(ROLES), roles
    return Gate(frozenset({*roles, "admin"}))


_bearer = HTTPBearer(auto_error=False, scheme_name="key", description="A key that `rlhf keys create` printed.")


@dataclass(frozen=True)
class Gate:
    """Checks the caller whom the door has made out; a route without a gate is not served."""

    roles: frozenset[Role]

    async def __call__(
        self, request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
    ) -> Caller:
        """The caller; 401 without a valid key, 403 with one of another role."""
        caller = request.scope.get("caller")
        if not isinstance(caller, Caller):
            raise unauthenticated()
        if caller.role not in self.roles:
            raise ApiError(403, f"a key with role {caller.role} may not do this: {_listed(self.roles)} may")
        return caller


def unauthenticated() -> ApiError:
    """The refusal of a request without a valid key; it does not say which of the two it was."""
    return ApiError(401, "give a valid key as 'Authorization: Bearer KEY'; `rlhf keys create` makes one")


def _listed(roles: frozenset[Role]) -> str:
    return " or ".join(role for role in ROLES if role in roles)


def _key(row: Row[tuple[str, ...]]) -> Key:
    used, revoked = (
        datetime.fromisoformat(moment) if moment else None for moment in (row.last_used_at, row.revoked_at)
    )
    return Key(row.prefix, row.name, row.role, datetime.fromisoformat(row.created_at), used, revoked)


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
