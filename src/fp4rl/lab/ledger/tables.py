"""The tables of the ledger: an index of runs, and each run's whole record as one document.

Every key comes from the content, so that a rebuilt ledger holds the same rows.
"""

import hashlib

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from fp4rl.spec.task import SCORES

SCHEMA = "-".join(("0003", *SCORES[3:]))  # a further score is a further column

metadata = MetaData()

schema = Table("ledger_schema", metadata, Column("version", Text, primary_key=True))

# `experiment` is the digest of the spec without its seed: runs of one experiment repeat each other.
runs = Table(
    "runs",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("suite", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("arm", Text, nullable=False),
    Column("seed", Integer),
    Column("experiment", String(12), index=True),
    Column("task", String(12)),
    Column("model", String(12)),
    Column("code_digest", Text),
    Column("steps_asked", Integer),
    Column("steps_done", Integer),
    Column("imported", Boolean, nullable=False),
    Column("status", Text),
    Column("content", String(64), nullable=False),
    UniqueConstraint("suite", "run_id", name="uq_runs_suite_run_id"),
    Index("ix_runs_suite_arm", "suite", "arm"),
)


def _run_column() -> Column[int]:
    return Column("run", BigInteger, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


evaluations = Table(
    "evaluations",
    metadata,
    _run_column(),
    Column("step", Integer, primary_key=True),
    Column("profile", Text, primary_key=True),
    Column("last", Boolean, nullable=False),
    Column("n", Integer),
    *(Column(name, Double) for name in (*SCORES, "mean_length")),
    Column("conditions", JSON, nullable=False),
)

# `metrics` stands alone: it is the longest part, and only `show` reads it.
documents = Table(
    "documents",
    metadata,
    _run_column(),
    Column("record", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
)


def run_number(suite: str, run_id: str) -> int:
    """63 bits of SHA-256 over the run's name: the same in every ledger, whatever the order of recording."""
    return int.from_bytes(hashlib.sha256(f"{suite}/{run_id}".encode()).digest()[:8]) >> 1
