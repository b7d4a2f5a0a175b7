"""Digests of descriptions: equal contents have equal digests, in every process and on every machine."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from fp4rl.spec.former_names import with_first_names


def canonical(value: Any) -> str:
    """Return a description as JSON with sorted keys and no spaces; pydantic models with all their defaults.

    What was renamed is written under its first name, so that runs keep their ids.
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(
        with_first_names(plain), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits of SHA-256 over the canonical JSON (a clash among a million runs: 1 in 500)."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]
