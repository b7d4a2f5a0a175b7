"""Other searches that were judged on the same problems: each further look makes a good word by chance likelier."""

from collections.abc import Iterator
from pathlib import Path

from fp4rl.lab.search.records import FILE, Begun, Book, Judged
from fp4rl.spec.errors import UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.space import Space


def earlier(root: Path, space: Space) -> tuple[str, ...]:
    """Return the names of other searches below `root` whose finals had problems of this one's, in their order.

    Records that cannot be read belong to no search that this one can speak of.
    """
    task = parse(Experiment, space.base, "base").task
    return tuple(name for name, other in _judged(root, space.search) if other == task)


def _judged(root: Path, own: str) -> Iterator[tuple[str, object]]:
    """Yield the name and the task of every other search that has numbers of its final."""
    for file in sorted(root.glob(f"*/{FILE}")):
        if file.parent.name == own:
            continue
        try:
            book = Book.read(file)
            begun = book.last(Begun)
            if begun is not None and book.last(Judged) is not None:
                base = Space.model_validate(begun.space).base
                yield file.parent.name, parse(Experiment, base, "base").task
        except (UserError, ValueError):
            continue
