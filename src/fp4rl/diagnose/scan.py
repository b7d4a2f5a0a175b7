"""A whole scan: every requested measurement of exactly the tensors that the injection would change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration, calibrate
from fp4rl.diagnose.depth import depth
from fp4rl.diagnose.dynamics import dynamics, ratios
from fp4rl.diagnose.expert_sensitivity import expert_sensitivity
from fp4rl.diagnose.passes import Progress
from fp4rl.diagnose.precision import input_errors, weight_errors, weights_of
from fp4rl.diagnose.report import Distribution, ScanReport
from fp4rl.diagnose.sensitivity import sensitivity
from fp4rl.diagnose.suspects import suspects
from fp4rl.inject.attach import attach
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import Scan

Stages = Callable[[str, int, int], None]  # stage, done, total
EVERYTHING = Scan()
BINS = 161
REACH = 4.0  # histograms show this many root mean squares to each side


def scan(
    model: nn.Module,
    injection: Injection,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | Calibration = (),
    spec: Scan = EVERYTHING,
    on_stage: Stages | None = None,
) -> ScanReport:
    """Measure what `injection` would do to a live model, which is not changed.

    Without texts only the precision of weights can be measured. Raises what `resolve` raises (no linear layers, no
    match of a pattern), and InvalidValueError for texts that cannot be used, or that are missing for a part.
    """
    table = resolve(model, injection)
    if not table.plans:
        raise InvalidValueError("this injection rounds nothing, so there is nothing to scan; take a mode such as w4a16")
    calibration = _calibration(tokenizer, texts, spec)
    if calibration is None and set(spec.parts) != {"precision"}:
        raise InvalidValueError("sensitivity, depth and dynamics need texts; give some, or scan parts=('precision',)")
    generator = torch.Generator().manual_seed(spec.seed)
    results: dict[str, Any] = {}
    if "precision" in spec.parts:
        parts, results["tallies"] = weight_errors(model, table, _stage(on_stage, "weights"))
        inputs = input_errors(model, table, calibration, _stage(on_stage, "inputs")) if calibration else ()
        results["parts"] = (*parts, *inputs)
    if calibration is not None:
        results["calibration"] = calibration.described()
        results |= _fed(model, table, calibration, spec, generator, on_stage)
    report = ScanReport(type(model).__name__, table, **results)
    site = worst_site(report)
    return report if site is None else replace(report, distribution=distribution(model, report, site))


def _fed(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    spec: Scan,
    generator: torch.Generator,
    on_stage: Stages | None,
) -> dict[str, Any]:
    """Return the parts that need texts."""
    results: dict[str, Any] = {}
    if "dynamics" in spec.parts:
        results["dynamics"] = dynamics(model, table, calibration, generator=generator, batches=spec.probed_batches)
        results["verdict"] = suspects(results["dynamics"])
        with attach(model, table) as attachment:
            attachment.set_phase("evaluation")
            again = torch.Generator().manual_seed(spec.seed)
            injected = dynamics(model, table, calibration, generator=again, batches=spec.probed_batches, probed=False)
        results["ratios"] = ratios(results["dynamics"], injected)
    if "depth" in spec.parts:
        results["depth"] = depth(model, table, calibration, on_progress=_stage(on_stage, "depth"))
    if "sensitivity" in spec.parts:
        results["sensitivity"] = sensitivity(
            model,
            table,
            calibration,
            measured=spec.measured,
            leave_one_out=spec.leave_one_out,
            generator=generator,
            on_progress=_stage(on_stage, "sensitivity"),
        )
        few = spec.measured_experts if spec.measured else 0
        experts = expert_sensitivity(
            model, table, calibration, measured=few, generator=generator, on_progress=_stage(on_stage, "experts")
        )
        results["sensitivity"] = replace(results["sensitivity"], experts=experts)
    return results


def distribution(model: nn.Module, report: ScanReport, site: str) -> Distribution:
    """Count a histogram of one scanned weight before and after rounding; InvalidValueError if it is not rounded."""
    plan = next((p for p in report.table.plans if p.name == site and p.weight is not None), None)
    if plan is None or plan.weight is None:
        raise InvalidValueError(f"no weight of {site!r} is rounded in this scan; name one of the table's sites")
    matrices = [weight.to(getattr(torch, report.table.injection.dtype)) for weight in weights_of(model, plan)]
    seen = torch.cat(matrices)
    generator = torch.Generator(seen.device).manual_seed(0) if plan.weight.rounding == "stochastic" else None
    rounded = torch.cat([fake_quantize(matrix.contiguous(), plan.weight, generator=generator) for matrix in matrices])
    unit = float(seen.float().square().mean().sqrt()) or 1.0
    edges = torch.linspace(-REACH, REACH, BINS + 1)
    counts = [torch.histogram((x.float().cpu() / unit).clamp(-REACH, REACH), edges).hist for x in (seen, rounded)]
    before, after = (tuple(int(n) for n in count) for count in counts)
    return Distribution(site, tuple(round(float(e), 6) for e in edges), before, after)


def worst_site(report: ScanReport) -> str | None:
    """Return the rounded weight with the largest KL, or with the largest excess where KL was not measured."""
    weights = {part.site: part for part in report.parts if part.part == "weight"}
    if report.sensitivity is not None and weights:
        known = [site for site in report.sensitivity.sites if site.name in weights]
        return max(known, key=lambda s: s.kl).name if known else None
    return max(weights, key=lambda name: weights[name].excess) if weights else None


def _calibration(tokenizer: Any, texts: Sequence[str] | Calibration, spec: Scan) -> Calibration | None:
    if isinstance(texts, Calibration):
        return texts
    if not texts:
        return None
    if tokenizer is None:
        raise InvalidValueError("texts need the model's tokenizer; pass tokenizer=...")
    return calibrate(tokenizer, texts, batch_size=spec.batch_size, longest=spec.longest)


def _stage(on_stage: Stages | None, name: str) -> Progress | None:
    return None if on_stage is None else lambda done, total: on_stage(name, done, total)
