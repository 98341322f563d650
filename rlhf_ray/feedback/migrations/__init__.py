"""Bringing a store to this version: alembic's revisions under `versions/`, in the transaction that opens the store.

Stores of before there were revisions (schema 1 to 3, SQLite) have a table `schema_version` instead; the first revision
makes whatever they lack.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from rlhf_ray.errors import DataError

HEAD = "0002"
REVISIONS, EARLY = "alembic_version", "schema_version"
"""The tables by which stores are known, of now and of before revisions."""
LAST_EARLY = 3


def version_of(connection: Connection) -> str | None:
    """The revision of a store, `early` for one of before revisions, None for an empty database.

    `DataError` where it is something else's, or of a newer version.
    """
    names = set(inspect(connection).get_table_names())
    if not names:
        return None
    if {REVISIONS, "feedback"} <= names:
        revision = MigrationContext.configure(connection).get_current_revision()
        if revision != HEAD and revision not in _known():
            raise DataError(f"was written by a newer rlhf-ray (revision {revision}, this one knows {HEAD}): upgrade")
        return revision
    if {EARLY, "feedback"} <= names:
        early = connection.execute(text(f"SELECT max(version) FROM {EARLY}")).scalar()
        if early is None or early > LAST_EARLY:
            raise DataError(f"was written by a newer rlhf-ray (schema {early}, this one reads {LAST_EARLY}): upgrade")
        return "early"
    raise DataError("is a database of something else: name another one for the feedback store")


def upgrade(connection: Connection) -> None:
    """Makes the tables that are missing, within the transaction of this connection."""
    if version_of(connection) != HEAD:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
