"""Items: which problems each evaluation solved."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "problem_lists",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("packed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "items",
        sa.Column("run", sa.BigInteger, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("profile", sa.Text, primary_key=True),
        sa.Column("problems", sa.String(64), sa.ForeignKey("problem_lists.digest"), nullable=False),
        *(
            sa.Column(name, sa.LargeBinary, nullable=False)
            for name in ("strict", "flexible", "formatted", "truncated", "lengths")
        ),
    )
    # The items of runs that are already here lie in their folders: a run without known content is recorded again.
    op.execute("UPDATE runs SET content = ''")


def downgrade() -> None:
    op.drop_table("items")
    op.drop_table("problem_lists")
