"""How far runs lie apart that differ in the seed alone, for suites whose own arms cannot tell."""

from pathlib import Path

from fp4rl.lab.ledger.query import spread_of_repeats
from fp4rl.lab.ledger.store import open_ledger
from fp4rl.lab.statistics.seeds import Spread
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment


def from_ledger(place: str | Path, experiment: Experiment) -> Spread | None:
    """The spread in points over every repeat of the same task and model in the ledger at `place`; None without any."""
    if isinstance(place, Path) and not place.is_file():
        return None
    described = experiment.model_dump(mode="json")
    with open_ledger(place) as ledger, ledger.reading() as connection:
        return spread_of_repeats(connection, digest(described["task"]), digest(described["model"]))
