"""The tables of the ledger: an index of runs, and each run's whole record as one document.

Every key comes from the content, so that a rebuilt ledger holds the same rows.
"""

import hashlib

import sqlalchemy as sa

from fp4rl.spec.task import SCORES

SCHEMA = "-".join(("0003", *SCORES[3:]))  # a further score is a further column

metadata = sa.MetaData()

schema = sa.Table("ledger_schema", metadata, sa.Column("version", sa.Text, primary_key=True))

# `experiment` is the digest of the spec without its seed: runs of one experiment repeat each other.
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("suite", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),
    sa.Column("seed", sa.Integer),
    sa.Column("experiment", sa.String(12), index=True),
    sa.Column("task", sa.String(12)),
    sa.Column("model", sa.String(12)),
    sa.Column("code_digest", sa.Text),
    sa.Column("steps_asked", sa.Integer),
    sa.Column("steps_done", sa.Integer),
    sa.Column("imported", sa.Boolean, nullable=False),
    sa.Column("status", sa.Text),
    sa.Column("content", sa.String(64), nullable=False),
    sa.UniqueConstraint("suite", "run_id", name="uq_runs_suite_run_id"),
    sa.Index("ix_runs_suite_arm", "suite", "arm"),
)


def _run_column() -> sa.Column[int]:
    return sa.Column("run", sa.BigInteger, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


evaluations = sa.Table(
    "evaluations",
    metadata,
    _run_column(),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("profile", sa.Text, primary_key=True),
    sa.Column("last", sa.Boolean, nullable=False),
    sa.Column("n", sa.Integer),
    *(sa.Column(name, sa.Double) for name in (*SCORES, "mean_length")),
    sa.Column("conditions", sa.JSON, nullable=False),
)

# `metrics` stands alone: it is the longest part, and only `show` reads it.
documents = sa.Table(
    "documents",
    metadata,
    _run_column(),
    sa.Column("record", sa.JSON, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
)


def run_number(suite: str, run_id: str) -> int:
    """63 bits of SHA-256 over the run's name: the same in every ledger, whatever the order of recording."""
    return int.from_bytes(hashlib.sha256(f"{suite}/{run_id}".encode()).digest()[:8]) >> 1
