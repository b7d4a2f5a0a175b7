"""What a search did, a line of `search.jsonl` for each step: enough to go on from, and to write its report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, JsonValue, TypeAdapter

from fp4rl.lab.files import append_line, damage_named, finished_lines
from fp4rl.spec.frozen import Record
from fp4rl.spec.words import counted

FILE = "search.jsonl"
L = TypeVar("L", bound="Line")


class Line(Record):
    """One step of a search."""

    kind: str


def called(number: int) -> str:
    """Return the name of a candidate by its number: c07."""
    return f"c{number:02d}"


class Begun(Line):
    """What is searched: the space as it was read, its digest, the number of combinations; and the code's digest."""

    kind: Literal["begun"] = "begun"
    digest: str
    space: Mapping[str, JsonValue]
    size: int | None = None
    sampler: str
    code: str | None = None


class Earlier(Line):
    """Other searches of the same folder that were judged on the same problems before this one began."""

    kind: Literal["earlier"] = "earlier"
    searches: tuple[str, ...]


class Proposed(Line):
    """One combination: a candidate, or why it is none."""

    kind: Literal["proposed"] = "proposed"
    number: int
    batch: int
    point: Mapping[str, str | float]
    words: str
    refused: str | None = None

    @property
    def name(self) -> str:
        """The name by which it goes, as in the arms of its runs."""
        return called(self.number)


class Measured(Line):
    """One run of a candidate: how many of the samples of each problem it solved, in their order; or why it `failed`,
    and whether by a `mistake` of the user's.

    `kl`: nats per token to its own unquantized policy. `bits`: a weight of its linear layers, and an input.
    """

    kind: Literal["measured"] = "measured"
    candidate: int
    steps: int
    seed: int
    run: str
    solved: tuple[int, ...] = ()
    samples: int = 1
    kl: float | None = None
    bits: tuple[float, float] | None = None
    step_s: float = 0.0
    run_s: float = 0.0
    failed: str | None = None
    mistake: bool = False

    @property
    def share(self) -> float:
        """The accuracy, a share."""
        return sum(self.solved) / (len(self.solved) * self.samples) if self.solved else 0.0


class Round(Record):
    """A round as planned: steps of each run, candidates that begin it, and further runs where they are close."""

    steps: int
    candidates: int
    extra: int


class Planned(Line):
    """How the budget is divided, by the pace of the first runs: seconds a step, the dearest of them."""

    kind: Literal["planned"] = "planned"
    budget_s: float
    jobs: int
    pace_s: float
    stages_s: float
    wave_s: float
    final_s: float
    final_seeds: tuple[int, ...]
    rounds: tuple[Round, ...]
    why: str


class Added(Line):
    """A further seed for candidates between which a round could not decide."""

    kind: Literal["added"] = "added"
    round: int
    seed: int
    candidates: tuple[int, ...]
    why: str


class Decided(Line):
    """The end of a round: who goes on, in order, and why each of the others does not."""

    kind: Literal["decided"] = "decided"
    round: int
    kept: tuple[int, ...]
    dropped: Mapping[str, str]


class Cut(Line):
    """The end of screening before its plan was done, so that the final keeps its time."""

    kind: Literal["cut"] = "cut"
    round: int
    why: str


class Chosen(Line):
    """The candidate that is judged; `close`: those that screening could not tell from it."""

    kind: Literal["chosen"] = "chosen"
    candidate: int
    round: int
    close: tuple[int, ...]
    why: str


class Judged(Line):
    """The verdict of the final: `word` as everywhere (None: no verdict), the difference in points with its interval.

    `budgets`: what the runs of both sides took, whether that is `equal`, and a `sentence` where something is not.
    `quotable`, `marks`: as in every comparison. `trained`: learning rate, schedule and steps of recipe and control.
    `whole`: whether all seeds of the plan are in; before that there is no word, or the budget would choose it.
    """

    kind: Literal["judged"] = "judged"
    word: str | None = None
    sentence: str
    treatment: tuple[float, ...]
    control: tuple[float, ...]
    seeds: tuple[int, ...]
    margin: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    lower_bound: float | None = None
    p: float | None = None
    refused: tuple[str, ...] = ()
    needed: str | None = None
    whole: bool = True
    budgets: Mapping[str, JsonValue] | None = None
    quotable: bool = False
    marks: tuple[str, ...] = ()
    trained: tuple[str, str] | None = None

    def over(self, seeds: Sequence[int]) -> "Judged":
        """Return it as the verdict over all these seeds; where some are missing, its numbers alone."""
        if {*self.seeds}.issuperset(seeds):
            return self.extended(whole=True)
        nothing = dict.fromkeys(("word", "lower_bound", "p", "needed"))
        sentence = f"not decided: {len(self.seeds)} of {counted(len(seeds), 'seed')} are in"
        return self.extended(**nothing, sentence=sentence, quotable=False, whole=False)


class Spent(Line):
    """The budget that was used so far, in seconds; `why` where a session ended."""

    kind: Literal["spent"] = "spent"
    used_s: float
    why: str | None = None


AnyLine = Begun | Earlier | Proposed | Measured | Planned | Added | Decided | Cut | Chosen | Judged | Spent
_READ: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="kind")])


class Book:
    """The records of one search, in order; appended to its file where it has one. What was written is never changed."""

    def __init__(self, file: Path | None = None, lines: Sequence[AnyLine] = ()) -> None:
        self._file = file
        self.lines: list[AnyLine] = list(lines)

    @classmethod
    def read(cls, file: Path) -> "Book":
        """Return the records of a file, none where there is no file yet. Raises Damaged for one that is unreadable."""
        with damage_named(file):
            return cls(file, [_READ.validate_json(line) for line in finished_lines(file)])

    def add(self, *lines: AnyLine) -> None:
        """Append lines; after a crash the first of them are there."""
        for line in lines:
            if self._file is not None:
                append_line(self._file, line.model_dump(mode="json", exclude_none=True))
            self.lines.append(line)

    def of(self, kind: type[L]) -> list[L]:
        """Return the lines of one kind."""
        return [line for line in self.lines if isinstance(line, kind)]

    def last(self, kind: type[L]) -> L | None:
        """Return the last line of a kind; None where there is none."""
        return next(iter(reversed(self.of(kind))), None)

    def measured(self) -> dict[tuple[int, int, int], Measured]:
        """Return (candidate, steps, seed) -> its run."""
        return {(line.candidate, line.steps, line.seed): line for line in self.of(Measured)}

    def candidates(self) -> Iterator[Proposed]:
        """Yield the combinations that are candidates."""
        return (line for line in self.of(Proposed) if line.refused is None)

    @property
    def used_s(self) -> float:
        """The budget used so far, in seconds."""
        return max((line.used_s for line in self.of(Spent)), default=0.0)
