"""The way from an older schema to a newer one, by Alembic, inside the caller's transaction."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from fp4rl.spec.errors import InvalidValueError


def migrate(connection: Connection, revision: str = "head") -> None:
    """Raises `InvalidValueError` for a ledger whose schema this version does not know: a newer one made it."""
    config = _config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        raise InvalidValueError(
            f"this ledger was made by a newer fp4rl ({error}); update fp4rl, or name another file"
        ) from None


def newest() -> str | None:
    """The newest schema that the package ships."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
