"""From what stands on a command line to the runs it describes."""

from pathlib import Path

from fp4rl.lab.catalogue import named, names
from fp4rl.lab.matrix import PlannedRun, planned, single
from fp4rl.spec.door import load_spec
from fp4rl.spec.experiment import Suite


def spec_file(spec: Path) -> Path:
    """A file on this disk, or a suite of the catalogue by its name (`catalogue/quickstart`)."""
    if spec.exists() or spec.suffix:
        return spec
    return named(spec.name) if spec.parent.name == "catalogue" or spec.name in names() else spec


def runs_of(spec: Path, overrides: list[str]) -> tuple[PlannedRun, ...]:
    """The runs that a file describes: those of a suite, or a single one named after the file."""
    described = load_spec(spec_file(spec), overrides)
    return planned(described) if isinstance(described, Suite) else (single(described, spec.stem),)
