"""Checks of arithmetic: the quantizer against known vectors, and every rounded point's gradients against float64."""

from collections.abc import Iterator, Sequence
from typing import Any

from fp4rl.lab.preflight.data import is_missing, without_tokenizer
from fp4rl.lab.preflight.gradients import checks_of
from fp4rl.lab.preflight.kinds import Kind, kinds_of
from fp4rl.lab.preflight.model import modules_of
from fp4rl.lab.preflight.rows import Check, Row, Subject
from fp4rl.numerics import selftest
from fp4rl.spec.words import counted

_CURE = "`fp4rl doctor` tests every device; take another FP4RL_BACKEND"


def quantizer(_: Subject) -> Iterator[Row]:
    """Test the quantizer: vectors, ties, scale invariance, idempotence, unbiased noise, true tiles."""
    yield _row(selftest.self_test(), "every check of the quantizer's self-test", _CURE)


def gradients(subject: Subject) -> Iterator[Row]:
    """Test results and gradients of everything that the injections round or make err, at each stage of a precision."""
    kinds: dict[Any, Kind] = {}
    missing = None
    for own in subject.arms.values():
        if own.injection is not None and is_missing(own.model):
            missing = without_tokenizer(own.model)
        elif own.injection is not None:
            kinds |= {kind.key: kind for kind in kinds_of(modules_of(own.model), own.injection)}
    written = [kind for kind in kinds.values() if kind.unwritten is None]
    expected = f"the formulas in float64 of {', '.join(dict.fromkeys(kind.what for kind in written))}"
    if written:
        yield _row([check for kind in written for check in checks_of(kind)], expected, "report it: a fault of fp4rl")
    if missing is not None:
        yield Row("waits", missing, "gradients of what is rounded as their formulas in float64 give them")
    for name in sorted({kind.unwritten for kind in kinds.values() if kind.unwritten is not None}):
        yield Row("waits", f"no formula of {name} is written here", "its gradients against float64")


def _row(checks: Sequence[selftest.Check], expected: str, cure: str) -> Row:
    broken = [f"{check.name}: {check.seen}" for check in checks if not check.passed]
    if broken:
        return Row("fail", f"{broken[0]}{f' (and {len(broken) - 1} more)' if broken[1:] else ''}", expected, cure)
    return Row("pass", f"{counted(len(checks), 'comparison')} hold", expected)


CHECKS = (
    Check("quantizer", ("P14",), quantizer),
    Check("gradients", ("P08",), gradients),
)
