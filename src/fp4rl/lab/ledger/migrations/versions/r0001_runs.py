"""The first schema: experiments, runs, metrics, evaluations, evidence, artefacts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _run() -> sa.Column[int]:
    return sa.Column("run", sa.BigInteger, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


def upgrade() -> None:
    _experiments_and_runs()
    op.create_table(
        "metrics",
        _run(),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Double),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "evaluations",
        _run(),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("profile", sa.Text, primary_key=True),
        sa.Column("last", sa.Boolean, nullable=False),
        sa.Column("n", sa.Integer),
        *(sa.Column(name, sa.Double) for name in ("strict", "flexible", "formatted", "mean_length")),
        sa.Column("conditions", sa.JSON, nullable=False),
    )
    op.create_table(
        "evidence",
        _run(),
        sa.Column("line", sa.Integer, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("phase", sa.Text),
        sa.Column("step", sa.Integer),
        sa.Column("content", sa.JSON, nullable=False),
    )
    op.create_table(
        "artefacts",
        _run(),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64)),
    )


def _experiments_and_runs() -> None:
    op.create_table(
        "experiments",
        sa.Column("digest", sa.String(12), primary_key=True),
        sa.Column("task", sa.String(12), nullable=False),
        sa.Column("model", sa.String(12), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("suite", "run_id", "arm")),
        sa.Column("seed", sa.Integer),
        sa.Column("experiment", sa.String(12), sa.ForeignKey("experiments.digest")),
        *(sa.Column(name, sa.Text) for name in ("spec_digest", "code_digest", "sites_digest")),
        *(sa.Column(name, sa.Integer) for name in ("steps_asked", "steps_done")),
        sa.Column("wall_s", sa.Double),
        *(sa.Column(name, sa.JSON, nullable=False) for name in ("versions", "evidence")),
        sa.Column("imported", sa.JSON),
        sa.Column("content", sa.String(64), nullable=False),
        sa.UniqueConstraint("suite", "run_id", name="uq_runs_suite_run_id"),
    )
    op.create_index("ix_runs_suite_arm", "runs", ["suite", "arm"])
    op.create_index("ix_runs_experiment", "runs", ["experiment"])


def downgrade() -> None:
    for table in ("artefacts", "evidence", "evaluations", "metrics", "runs", "experiments"):
        op.drop_table(table)
