"""What Alembic runs: migrations on the connection it is handed, within the transaction that is already open."""

from alembic import context

# The caller's transaction holds the whole migration, on SQLite too: it happens wholly or not at all.
context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
