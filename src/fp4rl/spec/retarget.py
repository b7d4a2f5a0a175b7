"""One injection under another deployment or in another format, everything else of it kept."""

from typing import Any

from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format, describe, format_of
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import parse
from fp4rl.spec.points import LINEAR_POINTS, PatternFormats, as_served

_ROUNDED = (*LINEAR_POINTS, "kv_cache")


def under_deployment(injection: Injection, deployment: str) -> Injection:
    """Return the injection with the rules of `deployment` in place of those of its own.

    Raises NotFoundError for an unknown deployment, InvalidValueError where a format sets a rule itself that it fixes.
    """
    deployment_named(deployment)
    own, *exceptions = (
        row.model_dump(mode="json")
        | {point: _without_rules(injection, point, fmt) for point, fmt in row if point in _ROUNDED}
        for row in (injection, *_own_exceptions(injection))
    )
    if injection.schedule is not None:
        own["schedule"] = {
            point: first.model_dump(mode="json") | {"before": _without_rules(injection, point, first.before)}
            for point, first in injection.schedule.points.items()
        }
    return parse(Injection, own | {"deployment": deployment, "by_pattern": exceptions}, "deployment")


def in_format(injection: Injection, fmt: str) -> Injection:
    """Return the injection with `fmt`, under its own deployment, where its linear layers are rounded; exceptions stay.

    Raises NotFoundError for an unknown format, InvalidValueError where no linear layer is rounded.
    """
    formats = {
        point: describe(as_served(point, format_of(fmt))) for point in LINEAR_POINTS if getattr(injection, point)
    }
    if not formats:
        raise InvalidValueError(
            f"{injection.name} rounds no linear layer, so format {fmt} has no place; name another mode"
        )
    own = {"mode": None, "by_pattern": [row.model_dump(mode="json") for row in _own_exceptions(injection)]}
    return parse(Injection, injection.model_dump(mode="json") | formats | own, "format")


def _own_exceptions(injection: Injection) -> list[PatternFormats]:
    """Return the exceptions that are not those of the deployment."""
    made = injection.model_validate(injection.model_dump(mode="json") | {"by_pattern": ()}).by_pattern
    return [row for row in injection.by_pattern if row not in made]


def _without_rules(injection: Injection, point: str, fmt: Any) -> Any:
    """Return the format as it was described: a rule that its deployment put there is taken out again."""
    if not isinstance(fmt, Format) or injection.deployment is None:
        return fmt
    return deployment_named(injection.deployment).without_rules(point, fmt)
