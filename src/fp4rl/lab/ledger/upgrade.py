"""A ledger of an older schema is made again from what it holds; the folders then complete it."""

from collections import defaultdict

from sqlalchemy import Connection, MetaData, select, text

from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.document import Document, Row, read_document, write
from fp4rl.spec.errors import InvalidValueError

_OLD = ("experiments", "runs", "metrics", "evaluations", "evidence", "artefacts")
_DROPPED = ("items", "problem_lists", "alembic_version")


def schema_of(connection: Connection) -> str | None:
    """The schema's number; None for an empty database."""
    for table, column in ((tables.schema.name, "version"), ("alembic_version", "version_num")):
        if connection.dialect.has_table(connection, table):
            version: str | None = connection.execute(text(f"SELECT {column} FROM {table}")).scalar()
            return version
    return None


def bring_up_to_date(connection: Connection) -> None:
    """Make the tables of this version, with every run of the old ones in them.

    Schemas 0001 and 0002 spread a run over tables; their packed items are dropped, as the run folders hold them.
    Raises `InvalidValueError` for a ledger that a newer version made.
    """
    version = schema_of(connection)
    if version not in (None, "0001", "0002"):
        raise InvalidValueError(
            f"this ledger was made by a newer fp4rl (schema {version}); update fp4rl, or name another file"
        )
    documents = []
    if version is not None:
        old = MetaData()
        old.reflect(connection, only=lambda name, _: name in (*_OLD, *_DROPPED))  # nothing else that stands there
        documents = _old_documents(connection, old)
        old.drop_all(connection)
    tables.metadata.create_all(connection)
    connection.execute(tables.schema.insert().values(version=tables.SCHEMA))
    for document in documents:
        write(connection, document)


def _old_documents(connection: Connection, old: MetaData) -> list[Document]:
    """Every run of the old tables. Its content is unknown, so that it is read again where its folder is there."""
    rows = {name: [dict(row) for row in connection.execute(select(old.tables[name])).mappings()] for name in _OLD}
    specs = {row["digest"]: row["spec"] for row in rows["experiments"]}
    of_run: dict[str, dict[int, list[Row]]] = {name: defaultdict(list) for name in _OLD}
    for name in ("metrics", "evaluations", "evidence", "artefacts"):
        for row in rows[name]:
            of_run[name][row.pop("run")].append(row)
    return [_old_document(row, specs, {name: of_run[name][row["id"]] for name in of_run}) for row in rows["runs"]]


def _old_document(run: Row, specs: dict[str, Row], of_run: dict[str, list[Row]]) -> Document:
    evaluations = [row | {"profile": row["conditions"] | {"name": row["profile"]}} for row in of_run["evaluations"]]
    metrics: dict[int, Row] = defaultdict(dict)
    for row in of_run["metrics"]:  # SQLite kept NULL for not-a-number
        metrics[row["step"]][row["name"]] = float("nan") if row["value"] is None else row["value"]
    spec = specs.get(run["experiment"], {})
    lines = [row["content"] for row in sorted(of_run["evidence"], key=lambda row: row["line"])]
    record = {
        **{name: run[name] for name in ("suite", "run_id", "sites_digest")},
        "content": "",
        "spec": spec | {"seed": run["seed"]} if spec else {},
        "result": run | {"evaluations": evaluations},
        "evidence": lines,
        "items": [],
        "files": of_run["artefacts"],
    }
    try:
        return read_document(record, metrics)
    except InvalidValueError as error:
        raise InvalidValueError(
            f"the ledger's record of {run['suite']}/{run['run_id']} cannot be read ({error}); the ledger is as it was: "
            "move it away, and `fp4rl ledger rebuild` makes a new one"
        ) from None
