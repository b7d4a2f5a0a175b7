"""Checks of what is served: the mode that the deployment computes, its rule of inputs, the packer's dtype."""

from collections.abc import Iterator

from fp4rl.lab.preflight.rows import Check, Row, Subject, merged
from fp4rl.lab.preflight.settings import warned
from fp4rl.lab.serving import TWICE, rounds_twice, served_as
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import describe


def _served(experiment: Experiment) -> str | None:
    injection = experiment.injection
    return served_as(injection) if injection is not None and injection.formats else None


def rule(subject: Subject) -> Iterator[Row]:
    """Hold the formats of weights and inputs against what the deployment's packer and kernel would round them to."""
    yield from merged((arm, row) for arm, own in subject.arms.items() for row in _rules(own))


def _rules(experiment: Experiment) -> Iterator[Row]:
    injection, expected = experiment.injection, "weights as the packer rounds, inputs as the kernel does"
    formats = [(p, fmt) for p in ("weight", "input") if injection and (fmt := getattr(injection, p)) is not None]
    powers = [(point, fmt) for point, fmt in formats if fmt.scale == "e8m0" and fmt.rounding != "stochastic"]
    if injection is None or not powers:
        return
    if rounds_twice(injection):
        yield Row(
            "warn", f"no deployment can be named: {TWICE}", expected, "leave fallback out of what is to be served"
        )
        return
    if injection.deployment is None:
        cure = "name injection.deployment: `fp4rl deployments` lists them"
        yield Row("warn", "no deployment is named, so formats have OCP's rules", expected, cure)
        return
    target = DEPLOYMENTS[injection.deployment]
    words = []
    for point, fmt in powers:
        if (served := target.at(point, fmt)) != fmt:
            yield Row("fail", f"{point} {describe(fmt)} is served as {describe(served)}", expected, "drop the rule")
            return
        words.append(f"{point} {fmt.name} {fmt.scale_rule}, {fmt.rounding}")
    yield Row("pass", f"{target.name}: {'; '.join(words)}", expected)


def _dtype(experiment: Experiment) -> str | None:
    injection = experiment.injection
    if injection is None or not injection.weight:
        return None
    return f"weights are cast to {injection.dtype}, then rounded"


CHECKS = (
    Check("served", ("P38",), warned("served", "the mode that was trained", _served)),
    Check("rule", ("P39",), rule),
    Check("packer", ("P42",), warned("packer", "the dtype of the folder that is packed", _dtype)),
    Check(
        "judged",
        ("P23",),
        warned(
            "judged", "what is trained is what is judged", lambda own: f"judged as {', '.join(own.evaluation.profiles)}"
        ),
    ),
)
