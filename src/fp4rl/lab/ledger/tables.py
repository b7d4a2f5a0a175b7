"""The tables of the ledger. Every key comes from the content, so that a rebuilt ledger holds the same rows.

`items` packs one evaluation into one row: a bit per problem and sample for each flag, in the order of the problems that
`problem_lists` names. 1,000 runs with 5 evaluations of 1,319 problems are 5,000 such rows instead of 6.6 million; the
answers themselves stay in the run folder's Parquet files.
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
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA = "0002"  # the newest migration

metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_name)s", "pk": "pk_%(table_name)s"})


def _run_column() -> Column[int]:
    return Column("run", BigInteger, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


# What was described, without the seed: the runs of one row are repeats of each other.
experiments = Table(
    "experiments",
    metadata,
    Column("digest", String(12), primary_key=True),
    Column("task", String(12), nullable=False),
    Column("model", String(12), nullable=False),
    Column("spec", JSON, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("suite", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("arm", Text, nullable=False),
    Column("seed", Integer),
    Column("experiment", ForeignKey("experiments.digest"), index=True),
    Column("spec_digest", Text),
    Column("code_digest", Text),
    Column("sites_digest", Text),
    Column("steps_asked", Integer),
    Column("steps_done", Integer),
    Column("wall_s", Double),
    Column("versions", JSON, nullable=False),
    Column("evidence", JSON, nullable=False),
    Column("imported", JSON(none_as_null=True)),
    Column("content", String(64), nullable=False),
    UniqueConstraint("suite", "run_id", name="uq_runs_suite_run_id"),
    Index("ix_runs_suite_arm", "suite", "arm"),
)

# SQLite has no word for not-a-number and keeps NULL; so a NULL value is a number that was logged and was none.
metrics = Table(
    "metrics",
    metadata,
    _run_column(),
    Column("step", Integer, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Double),
    sqlite_with_rowid=False,
)

evaluations = Table(
    "evaluations",
    metadata,
    _run_column(),
    Column("step", Integer, primary_key=True),
    Column("profile", Text, primary_key=True),
    Column("last", Boolean, nullable=False),
    Column("n", Integer),
    Column("strict", Double),
    Column("flexible", Double),
    Column("formatted", Double),
    Column("mean_length", Double),
    Column("conditions", JSON, nullable=False),
)

problem_lists = Table(
    "problem_lists",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("packed", LargeBinary, nullable=False),
)

items = Table(
    "items",
    metadata,
    _run_column(),
    Column("step", Integer, primary_key=True),
    Column("profile", Text, primary_key=True),
    Column("problems", ForeignKey("problem_lists.digest"), nullable=False),
    Column("strict", LargeBinary, nullable=False),
    Column("flexible", LargeBinary, nullable=False),
    Column("formatted", LargeBinary, nullable=False),
    Column("truncated", LargeBinary, nullable=False),
    Column("lengths", LargeBinary, nullable=False),
)

evidence = Table(
    "evidence",
    metadata,
    _run_column(),
    Column("line", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("phase", Text),
    Column("step", Integer),
    Column("content", JSON, nullable=False),
)

artefacts = Table(
    "artefacts",
    metadata,
    _run_column(),
    Column("path", Text, primary_key=True),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64)),
)

OF_A_RUN = (metrics, evaluations, items, evidence, artefacts)


def run_number(suite: str, run_id: str) -> int:
    """63 bits of SHA-256 over the run's name: the same in every ledger, whatever the order of recording."""
    return int.from_bytes(hashlib.sha256(f"{suite}/{run_id}".encode()).digest()[:8]) >> 1
