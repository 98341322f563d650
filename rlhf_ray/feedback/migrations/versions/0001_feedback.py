"""Feedback, snapshots, kept completions, request keys and exclusions: all of schema 1 to 3, as far as it is missing."""

import sqlalchemy as sa
from alembic import op

from rlhf_ray.feedback.migrations.append_only import keep_rows

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Stores of schema 1 have the first three tables, of schema 2 the first five."""
    there = set(sa.inspect(op.get_bind()).get_table_names())
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    wanted = {
        "feedback": (
            sa.Column("seq", number, primary_key=True),
            sa.Column("id", sa.Text, nullable=False, unique=True),
            sa.Column("kind", sa.Text, nullable=False),
            sa.Column("prompt_id", sa.Text, nullable=False),
            sa.Column("annotator", sa.Text, nullable=False),
            sa.Column("body", sa.Text, nullable=False),
        ),
        "snapshots": (
            sa.Column("id", sa.Text, primary_key=True),
            sa.Column("sha256", sa.Text, nullable=False),
            sa.Column("rows", sa.Integer, nullable=False),
        ),
        "snapshot_rows": (
            sa.Column("snapshot_id", sa.Text, sa.ForeignKey("snapshots.id"), primary_key=True),
            sa.Column("seq", number, sa.ForeignKey("feedback.seq"), primary_key=True, autoincrement=False),
        ),
        "completions": (
            sa.Column("id", sa.Text, primary_key=True),
            sa.Column("caller", sa.Text, nullable=False),
            sa.Column("created_at", sa.Text, nullable=False),
            sa.Column("body", sa.Text, nullable=False),
        ),
        "request_keys": (
            sa.Column("caller", sa.Text, primary_key=True),
            sa.Column("key", sa.Text, primary_key=True),
            sa.Column("request_sha256", sa.Text, nullable=False),
            sa.Column("answer", sa.Text, nullable=False),
        ),
        "exclusions": (
            sa.Column("seq", number, primary_key=True),
            sa.Column("what", sa.Text, nullable=False),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("out", sa.Integer, nullable=False),
            sa.Column("reason", sa.Text, nullable=False),
            sa.Column("by", sa.Text, nullable=False),
            sa.Column("created_at", sa.Text, nullable=False),
        ),
    }
    for name, columns in wanted.items():
        if name not in there:
            op.create_table(name, *columns, sqlite_with_rowid=name not in ("snapshot_rows", "request_keys"))
    if "feedback" not in there:
        op.create_index("feedback_by_annotator", "feedback", ["annotator"])
        op.create_index("feedback_by_prompt", "feedback", ["prompt_id"])
    if "completions" not in there:
        op.create_index("completions_by_caller", "completions", ["caller"])
        op.create_index("completions_by_time", "completions", ["created_at"])
    keep_rows(
        op.get_bind(),
        [name for name in wanted if name not in there and name != "completions"],
    )
