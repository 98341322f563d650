"""Triggers that refuse any change of a row, by whatever program, in either kind of database."""

from collections.abc import Sequence

from sqlalchemy import Connection, inspect, text

from rlhf_ray.sqlite import append_only_triggers

REFUSE = """
CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation'; END $$
"""


def keep_rows(connection: Connection, names: Sequence[str]) -> None:
    """From now on rows of these tables can be added only."""
    if connection.dialect.name == "sqlite":
        for name in names:
            keys = inspect(connection).get_pk_constraint(name)["constrained_columns"]
            has_id = any(column["name"] == "id" for column in inspect(connection).get_columns(name))
            for statement in append_only_triggers(name, keys, has_id=has_id):
                connection.exec_driver_sql(statement)
        return
    connection.execute(text(REFUSE))
    for name in names:
        connection.execute(
            text(
                f"CREATE TRIGGER {name}_no_change BEFORE UPDATE OR DELETE ON {name} "
                "FOR EACH ROW EXECUTE FUNCTION refuse_change()"
            )
        )
        connection.execute(
            text(
                f"CREATE TRIGGER {name}_no_truncate BEFORE TRUNCATE ON {name} "
                "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
            )
        )
