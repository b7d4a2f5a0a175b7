"""Checks of arithmetic: the quantizer against known vectors, and every rounded point's gradients against float64."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fp4rl.inject.selftest import gradients as gradients_of
from fp4rl.lab.preflight.rows import Check, Row, Subject
from fp4rl.numerics import selftest
from fp4rl.spec.formats import Format
from fp4rl.spec.points import GRADIENTS, LINEAR_POINTS
from fp4rl.spec.words import counted

_CURE = "`fp4rl doctor` tests every device; take another FP4RL_BACKEND"


def quantizer(_: Subject) -> Iterator[Row]:
    """Test the quantizer: vectors, ties, scale invariance, idempotence, unbiased noise, true tiles."""
    yield _row(selftest.self_test(), "every check of the quantizer's self-test", _CURE)


def gradients(subject: Subject) -> Iterator[Row]:
    """Test the gradients of every point and format of the injections on this processor."""
    pairs: dict[tuple[str, Format], None] = {}
    for injection in (own.injection for own in subject.arms.values() if own.injection is not None):
        for row in (injection, *injection.by_pattern):
            for point in (*LINEAR_POINTS, *GRADIENTS):
                fmt = getattr(row, point, None)
                if isinstance(fmt, Format) and fmt.rounding != "stochastic":  # which is right on average alone
                    pairs[point, replace(fmt, factor="tensor")] = None
    if pairs:
        made = [check for point, fmt in pairs for check in gradients_of(point, fmt, torch.device("cpu"))]
        yield _row(
            made,
            f"straight through, within 1e-9 of float64, at {counted(len(pairs), 'point')}",
            "report it: a fault of fp4rl",
        )


def _row(checks: Sequence[selftest.Check], expected: str, cure: str) -> Row:
    broken = [f"{check.name}: {check.seen}" for check in checks if not check.passed]
    if broken:
        return Row("fail", f"{broken[0]}{f' (and {len(broken) - 1} more)' if broken[1:] else ''}", expected, cure)
    return Row("pass", f"{counted(len(checks), 'comparison')} hold", expected)


CHECKS = (
    Check("quantizer", ("P14",), quantizer),
    Check("gradients", ("P08",), gradients),
)
