"""The table of known traps: how each happened, what catches it and when, how it shows, and the tests that plant it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml

WHEN = MappingProxyType({"before": "before the run", "steps": "in its steps", "comparison": "at comparison"})


@dataclass(frozen=True)
class Trap:
    """One trap. `caught`: a key of `WHEN` -> what catches it then, `module:name` below fp4rl; `tests`: below tests."""

    number: str
    trap: str
    happened: str
    caught: Mapping[str, tuple[str, ...]]
    shows: str
    tests: tuple[str, ...]


@cache
def traps() -> Mapping[str, Trap]:
    """Return number -> trap, in their order."""
    content = yaml.safe_load(Path(__file__).with_name("traps.yaml").read_text(encoding="utf-8"))
    made = {}
    for number, entry in content.items():
        caught = {when: tuple(entry["caught"][when]) for when in WHEN if when in entry["caught"]}
        if set(entry["caught"]) != set(caught) or not caught:
            raise ValueError(f"{number}: caught is of {', '.join(WHEN)}")
        made[number] = Trap(number, entry["trap"], entry["happened"], caught, entry["shows"], tuple(entry["tests"]))
    return MappingProxyType(made)
