"""The labelling queue, guidelines and erasures."""

import sqlalchemy as sa
from alembic import op

from rlhf_ray.feedback.migrations.append_only import keep_rows

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """New tables; what was there stays as it is."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "tasks",
        sa.Column("seq", number, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("policy_version", sa.Integer, nullable=True),
        sa.Column("priority", sa.Double, nullable=True),
        sa.Column("shuffle", sa.Double, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "task_events",
        sa.Column("seq", number, primary_key=True),
        sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.id"), nullable=False),
        sa.Column("annotator", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("until", sa.Text, nullable=True),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("task_events_by_task", "task_events", ["task_id", "annotator", "seq"])
    op.create_index("task_events_by_annotator", "task_events", ["annotator", "seq"])
    op.create_table(
        "guidelines",
        sa.Column("seq", number, primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
    )
    op.create_table(
        "erasures",
        sa.Column("seq", number, primary_key=True),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("snapshots", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
    )
    keep_rows(op.get_bind(), ["tasks", "task_events", "guidelines", "erasures"])
    if "schema_version" in sa.inspect(op.get_bind()).get_table_names():
        op.execute("INSERT INTO schema_version (version) VALUES (4)")  # so that an rlhf-ray of before refuses it
