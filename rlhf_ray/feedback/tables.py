"""The tables behind the store, as queries name them; `migrations` makes them, and the triggers that keep their rows."""

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, Table, Text

Number = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself in an INTEGER only
metadata = MetaData()

feedback = Table(
    "feedback",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("prompt_id", Text, nullable=False),
    Column("annotator", Text, nullable=False),
    Column("body", Text, nullable=False),
    Index("feedback_by_annotator", "annotator"),
    Index("feedback_by_prompt", "prompt_id"),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("rows", Integer, nullable=False),
)

snapshot_rows = Table(
    "snapshot_rows",
    metadata,
    Column("snapshot_id", Text, ForeignKey("snapshots.id"), primary_key=True),
    Column("seq", Number, ForeignKey("feedback.seq"), primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)

completions = Table(
    "completions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("caller", Text, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("body", Text, nullable=False),
    Index("completions_by_caller", "caller"),
    Index("completions_by_time", "created_at"),
)
"""Served answers; unlike feedback they are removed again, by age or on request."""

request_keys = Table(
    "request_keys",
    metadata,
    Column("caller", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", Text, nullable=False),
    Column("answer", Text, nullable=False),
    sqlite_with_rowid=False,
)
"""What was answered to which request, written with the rows that the request brought. Never forgotten."""

exclusions = Table(
    "exclusions",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("what", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("out", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("created_at", Text, nullable=False),
)
"""Flags; see `exclusions.py`."""

tasks = Table(
    "tasks",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("overlap", Integer, nullable=False),
    Column("policy_version", Integer, nullable=True),
    Column("priority", Double, nullable=True),
    Column("shuffle", Double, nullable=False),
    Column("body", Text, nullable=False),
)
"""What people are asked; see `tasks.py`."""

task_events = Table(
    "task_events",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("task_id", Text, ForeignKey("tasks.id"), nullable=False),
    Column("annotator", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("until", Text, nullable=True),
    Column("body", Text, nullable=False),
    Index("task_events_by_task", "task_id", "annotator", "seq"),
    Index("task_events_by_annotator", "annotator", "seq"),
)
"""Of a task and an annotator the last row holds."""

guidelines = Table(
    "guidelines",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("text", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("created_at", Text, nullable=False),
)
"""What annotators are asked to go by; the last row holds."""

erasures = Table(
    "erasures",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("what", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("snapshots", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("created_at", Text, nullable=False),
)
"""What was removed for good, without the words or the name that it was about; see `erasure.py`."""
