"""Checks of arithmetic: the quantizer against known vectors, and every rounded point's gradients against float64."""

from collections.abc import Iterator, Sequence

from fp4rl.lab.preflight.gradients import checks_of, sites_of
from fp4rl.lab.preflight.rows import Check, Row, Subject
from fp4rl.numerics import selftest
from fp4rl.spec.injection import Injection
from fp4rl.spec.words import counted

_CURE = "`fp4rl doctor` tests every device; take another FP4RL_BACKEND"


def quantizer(_: Subject) -> Iterator[Row]:
    """Test the quantizer: vectors, ties, scale invariance, idempotence, unbiased noise, true tiles."""
    yield _row(selftest.self_test(), "every check of the quantizer's self-test", _CURE)


def gradients(subject: Subject) -> Iterator[Row]:
    """Test the gradients of everything that the injections round, at each stage of a precision that changes."""
    injections = (own.injection for own in subject.arms.values() if own.injection is not None)
    sites: list[Injection] = []
    for site in (site for injection in injections for site in sites_of(injection)):
        if site not in sites:
            sites.append(site)
    if sites:
        made = [check for site in sites for check in checks_of(site)]
        expected = f"their formulas in float64, at {counted(len(sites), 'kind')} of sites"
        yield _row(made, expected, "report it: a fault of fp4rl")


def _row(checks: Sequence[selftest.Check], expected: str, cure: str) -> Row:
    broken = [f"{check.name}: {check.seen}" for check in checks if not check.passed]
    if broken:
        return Row("fail", f"{broken[0]}{f' (and {len(broken) - 1} more)' if broken[1:] else ''}", expected, cure)
    return Row("pass", f"{counted(len(checks), 'comparison')} hold", expected)


CHECKS = (
    Check("quantizer", ("P14",), quantizer),
    Check("gradients", ("P08",), gradients),
)
