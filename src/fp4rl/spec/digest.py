"""Digests of descriptions: equal contents have equal digests, in every process and on every machine."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from fp4rl.spec.former_names import with_first_names

NO_SEED = 610_257_913_448_067_325
"""Stands where a seed does; no other number of a description is the same."""


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


def digest_by_seed(description: Mapping[str, Any]) -> Callable[[int], str]:
    """Return a function: seed -> the digest of the plain description with it. What repeats share is done once."""
    before, *after = canonical({**description, "seed": NO_SEED}).split(str(NO_SEED))
    if len(after) != 1 or not before.endswith('"seed":'):
        return lambda seed: digest({**description, "seed": seed})
    begun, rest = hashlib.sha256(before.encode()), after[0]

    def of(seed: int) -> str:
        hashed = begun.copy()
        hashed.update(f"{seed}{rest}".encode())
        return hashed.hexdigest()[:12]

    return of
