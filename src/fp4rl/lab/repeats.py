"""What repeats of a run share is read once: the runs of an arm differ in their seed alone."""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from fp4rl.lab.files import loads
from fp4rl.spec.digest import NO_SEED, digest, digest_by_seed
from fp4rl.spec.former_names import with_present_names
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.records import Sites, read_sites

_SEED = re.compile(r"^seed: (0|[1-9][0-9]{0,17})$", re.MULTILINE)


def spec_values(text: str) -> Any:
    """Return the values of a spec. Repeats of a run differ in the line of their seed: the rest of them is read once."""
    before, seed, after = _SEED.split(text) if len(_SEED.findall(text)) == 1 else ("", "", "")
    around = _values_around(before, after) if seed else None
    return plain_values(text, "YAML") if around is None else pickle.loads(around) | {"seed": int(seed)}


@lru_cache(maxsize=512)  # runs are read seed by seed: all arms of a suite
def _values_around(before: str, after: str) -> bytes | None:
    """Return the values around the line of a seed; None where its number is not that key's alone."""
    values = plain_values(f"{before}seed: {NO_SEED}{after}", "YAML")
    alone = isinstance(values, dict) and values.get("seed") == NO_SEED
    return pickle.dumps(values) if alone and json.dumps(values).count(str(NO_SEED)) == 1 else None


@lru_cache(maxsize=512)
def sites_of(content: bytes) -> Sites:
    """Return the table in a sites.json."""
    return read_sites(loads(content))


def digest_and_present(spec: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the digest of a description, and the same in present names. What repeats of a run share is done once."""
    rest = pickle.dumps({key: value for key, value in spec.items() if key != "seed"})
    digest_of, translated = _of_repeats(rest)
    present: dict[str, Any] = pickle.loads(translated)
    if "seed" not in spec:
        return digest(spec), present
    seed = spec["seed"]
    return digest_of(seed) if type(seed) is int else digest(spec), present | {"seed": seed}


@lru_cache(maxsize=512)
def _of_repeats(rest: bytes) -> tuple[Callable[[int], str], bytes]:
    spec = pickle.loads(rest)
    return digest_by_seed(spec), pickle.dumps(with_present_names(spec))
