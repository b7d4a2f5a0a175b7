"""What a search came to, out of its records alone: every candidate with its fate, the front, the verdict in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from fp4rl.lab.files import json_ready
from fp4rl.lab.search.records import Begun, Book, Chosen, Cut, Decided, Earlier, Judged, Measured, Planned, Proposed
from fp4rl.spec.space import Space
from fp4rl.spec.words import agreeing, counted


@dataclass(frozen=True)
class Tried:
    """A candidate: what it measured in each round (mean over its seeds), how far it came, and why no further."""

    name: str
    words: str
    shares: tuple[float | None, ...]
    seeds: tuple[int, ...]
    kl: float | None
    bits: tuple[float, float] | None
    step_s: float | None
    fate: str

    @property
    def rounds(self) -> int:
        """How many rounds it ran."""
        return sum(share is not None for share in self.shares)

    @property
    def last(self) -> float | None:
        """Its accuracy in the last round that it ran, a share."""
        return next((share for share in reversed(self.shares) if share is not None), None)


@dataclass(frozen=True)
class Result:
    """The result of a search, finished or not, as its records tell it."""

    space: Space
    book: Book

    @cached_property
    def tried(self) -> list[Tried]:
        """Every candidate that ran, the best first: by rounds, then by accuracy."""
        rows = [self._tried(line) for line in self.book.candidates()]
        ran = [row for row in rows if row.rounds or row.fate.startswith("failed")]
        chosen = self.chosen.name if self.chosen is not None else None
        return sorted(ran, key=lambda row: (row.name != chosen, -row.rounds, -(row.last or 0.0), row.name))

    @cached_property
    def refused(self) -> list[Proposed]:
        """The combinations that were no candidates."""
        return [line for line in self.book.of(Proposed) if line.refused is not None]

    @property
    def chosen(self) -> Proposed | None:
        """The candidate that is judged; None where screening has not ended."""
        line = self.book.last(Chosen)
        return None if line is None else self._named(line.candidate)

    @property
    def judged(self) -> Judged | None:
        """The verdict; None where there is none yet."""
        return self.book.last(Judged)

    def front(self, number: int) -> list[Tried]:
        """Return the candidates of a round that no other of it beats in accuracy, bits and seconds a step together."""
        own = [row for row in self.tried if row.shares[number] is not None and row.bits is not None]
        goods = {
            row.name: (row.shares[number] or 0.0, *(-bits for bits in row.bits or ()), -(row.step_s or 0))
            for row in own
        }
        return [row for row in own if not any(_beats(goods[other.name], goods[row.name]) for other in own)]

    @property
    def last_round(self) -> int:
        """The last round that ran."""
        return max((row.rounds for row in self.tried), default=1) - 1

    def _named(self, number: int) -> Proposed:
        return next(line for line in self.book.of(Proposed) if line.number == number)

    def _tried(self, line: Proposed) -> Tried:
        rungs = self.space.screening.rungs
        every = [run for run in self.book.of(Measured) if run.candidate == line.number]
        runs = [run for run in every if run.failed is None]
        by_round = [[run for run in runs if run.steps == steps] for steps in rungs]
        last = next((own for own in reversed(by_round) if own), [])
        kls = [run.kl for run in last if run.kl is not None]
        return Tried(
            name=line.name,
            words=line.words,
            shares=tuple(fmean(run.share for run in own) if own else None for own in by_round),
            seeds=tuple(len(own) for own in by_round),
            kl=fmean(kls) if kls else None,
            bits=next((run.bits for run in last), None),
            step_s=fmean(run.step_s for run in last) if last else None,
            fate=self._fate(line.number, every),
        )

    def _fate(self, number: int, runs: Sequence[Measured]) -> str:
        chosen = self.book.last(Chosen)
        if chosen is not None and chosen.candidate == number:
            return f"chosen: {chosen.why}"
        for decided in self.book.of(Decided):
            if str(number) in decided.dropped:
                return f"round {decided.round + 1}: {decided.dropped[str(number)]}"
        failed = next((run.failed for run in runs if run.failed), None)
        if failed is not None:
            return f"failed: {failed}"
        return "went as far as the budget did" if self.book.of(Cut) else "still under way"

    # -- in words

    @cached_property
    def paragraph(self) -> str:
        """One paragraph that a reader can quote."""
        return " ".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        begun, space, count = self.book.last(Begun), self.space, len(self.tried)
        if begun is None or not count:
            yield f"The search {space.search} has no candidate that has run yet."
            return
        size = "a space with ranges" if begun.size is None else f"{counted(begun.size, 'combination')}"
        how = "drawn by TPE" if begun.sampler == "tpe" else "in the order of a grid"
        refused = f", {len(self.refused)} {agreeing(len(self.refused), 'was', 'were')} refused" if self.refused else ""
        were = agreeing(count, "was", "were")
        yield (
            f"Of {size}, {counted(count, 'candidate')} {were} tried{refused} ({how}), screened on "
            f"{counted(space.screening.count, 'validation problem')} in rounds of "
            f"{' and '.join(map(str, space.screening.rungs))} steps."
        )
        if (cut := self.book.last(Cut)) is not None:
            yield f"Screening ended before round {cut.round + 1}: {cut.why}."
        chosen, line = self.chosen, self.book.last(Chosen)
        if chosen is None or line is None:
            yield "Screening has not ended, so that nothing is chosen and nothing may be said."
            return
        near = f"; {counted(len(line.close), 'other')} could not be told from it" if line.close else ""
        yield f"Chosen was {chosen.name} ({chosen.words}), with {line.why}{near}."
        yield from self._verdict()

    def _verdict(self) -> Iterator[str]:
        judged, final = self.judged, self.space.final
        if judged is None:
            yield "The final has not been run."
            return
        took = judged.budgets or {}
        equal = " of equal budget" if took.get("equal") else ""
        yield (
            f"Judged on {counted(final.count, 'test problem')} over {counted(len(judged.seeds), 'fresh seed')}, with a "
            f"margin of {judged.margin:g} points that was fixed before, against an unquantized control{equal}:"
        )
        yield (
            judged.sentence
            if judged.whole
            else f"{judged.sentence}, and no word is said before all are: a larger --budget goes on."
        )
        if judged.difference is not None and judged.low is not None and judged.high is not None:
            so_far = "is" if judged.whole else "so far is"
            yield f"The difference {so_far} {judged.difference:+.2f} points [{judged.low:+.2f}, {judged.high:+.2f}]."
        if judged.whole and len(judged.seeds) < len(final.seeds):
            yield f"The file asks for {len(final.seeds)} seeds: the budget held {len(judged.seeds)} of them."
        if took.get("sentence") and str(took["sentence"]) not in judged.sentence:
            yield f"It is {took['sentence']}."
        if judged.word is not None and took and not judged.quotable:
            yield "It may not be quoted alone: other training than the control's may explain it."
        yield from self._trained(judged)
        yield from (f"Note: {mark}." for mark in judged.marks)
        if (looked := self.book.last(Earlier)) is not None:
            were = agreeing(len(looked.searches), "was", "were")
            yield f"On the same test problems {' and '.join(looked.searches)} {were} judged before."
        if judged.needed:
            yield f"What would decide: {judged.needed}."

    def _trained(self, judged: Judged) -> Iterator[str]:
        if judged.trained is None:
            return
        recipe, control = judged.trained
        yield f"The recipe trained with {recipe}; the control with {control}."
        if self.space.control is None:
            yield (
                "These hyperparameters were chosen for the recipe and not for the control, so that the verdict holds "
                "for this control; one that is tuned on its own may do better."
            )

    def lines(self) -> Iterator[str]:
        """Yield the result for a terminal."""
        yield self.paragraph
        for row in self.tried[:5]:
            shares = ", ".join("-" if share is None else f"{100 * share:.1f}" for share in row.shares)
            yield f"  {row.name}  {shares} %  {row.words}: {row.fate}"
        if len(self.tried) > 5:
            yield f"  and {len(self.tried) - 5} more: the report has all"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        chosen, judged, plan = self.chosen, self.judged, self.book.last(Planned)
        content = {
            "search": self.space.search,
            "paragraph": self.paragraph,
            "chosen": None if chosen is None else {"name": chosen.name, "point": chosen.point, "words": chosen.words},
            "verdict": None if judged is None else judged.model_dump(mode="json"),
            "tried": [vars(row) for row in self.tried],
            "refused": {line.words: line.refused for line in self.refused},
            "front": [row.name for row in self.front(self.last_round)],
            "plan": None if plan is None else plan.model_dump(mode="json"),
            "used_s": self.book.used_s,
        }
        return dict(json_ready(content))


def _beats(first: Sequence[float], second: Sequence[float]) -> bool:
    return first != second and all(a >= b for a, b in zip(first, second, strict=True))
