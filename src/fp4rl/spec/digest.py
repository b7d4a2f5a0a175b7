"""Digests of descriptions: equal contents have equal digests, in every process and on every machine."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

RENAMED = {"harm": "accuracy_drop_watch"}
"""Keys of `health.thresholds`: the name that stands in digests and in older files -> the present name."""
_FIRST = {present: first for first, present in RENAMED.items()}


def with_present_names(spec: Any) -> Any:
    """Return an experiment that an older version wrote, as plain values with the present names of its keys."""
    return _thresholds_renamed(spec, RENAMED)


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return `values` with those keys renamed that `names` holds."""
    return {names.get(key, key): value for key, value in values.items()}


def _thresholds_renamed(spec: Any, names: Mapping[str, str]) -> Any:
    health = spec.get("health") if isinstance(spec, Mapping) else None
    if not isinstance(health, Mapping) or not isinstance(health.get("thresholds"), Mapping):
        return spec
    return {**spec, "health": {**health, "thresholds": renamed(health["thresholds"], names)}}


def canonical(value: Any) -> str:
    """Return a description as JSON with sorted keys and no spaces; pydantic models with all their defaults.

    A renamed key is written under its first name, so that runs keep their ids.
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = _thresholds_renamed(plain, _FIRST)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits of SHA-256 over the canonical JSON (a clash among a million runs: 1 in 500)."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]
