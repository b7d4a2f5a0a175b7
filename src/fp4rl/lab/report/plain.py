"""The report as plain values for JSON."""

from dataclasses import asdict

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.compare.difference import differences
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.evidence import pooled_evidence
from fp4rl.lab.report.scores import Score
from fp4rl.lab.runs import Run
from fp4rl.lab.suites import SuiteRun


def as_dict(report: SuiteReport) -> dict[str, object]:
    """Every number of the report; accuracies, differences and margins in points, shares between 0 and 1."""
    return {
        "suite": report.name,
        "state": report.state,
        "code_digest": report.code_digest,
        "scores": [_score(score) for score in report.scores],
        "questions": [_question(question) for question in report.questions],
        "runs": [_run(run) for run in report.runs],
        "differences_between_arms": _arms(report),
        "not_planned": list(report.not_planned),
        "notes": list(report.notes),
    }


def _score(score: Score) -> dict[str, object]:
    means = ("before", "after", "flexible", "formatted", "formatted_before", "truncated")
    return {
        "arm": score.arm,
        "profile": score.profile,
        "measured_under": [profile.model_dump() for profile in score.profiles],
        "problems": score.problems,
        **{name: None if getattr(score, name) is None else asdict(getattr(score, name)) for name in means},
        "of_samples": {name: asdict(mean) for name, mean in score.of_samples.items()},
        "by_seed": [
            {
                "seed": s.seed,
                "run_id": s.run_id,
                "counts": s.counts,
                "stale": s.stale,
                "before": s.before,
                "after": s.after,
            }
            for s in score.by_seed
        ],
    }


def _question(answer: Answer) -> dict[str, object]:
    return {
        **(answer.question.asked.model_dump(mode="json") if answer.question.asked else {}),
        "word": answer.word,
        "sentence": answer.sentence(),
        "refused": list(answer.refused),
        "verdict": None if answer.verdict is None else answer.verdict.as_dict(),
    }


def _run(run: SuiteRun) -> dict[str, object]:
    result = None if run.run is None else run.run.result
    return {
        "run_id": run.planned.run_id,
        "arm": run.planned.arm,
        "seed": run.planned.seed,
        "state": run.state,
        "counts": run.counts,
        "stale": run.stale,
        "code_digest": run.code_digest,
        "gaps": list(run.gaps),
        "versions": dict(result.versions) if result else {},
        "wall_s": run.wall_s,
        "stopped": result.stopped if result else None,
        "evidence": None if run.run is None else _evidence(run.run),
    }


def _evidence(run: Run) -> dict[str, object]:
    evidence = pooled_evidence(run)
    return {
        "sites": evidence.sites,
        "sites_digest": evidence.sites_digest,
        "roundings": [asdict(rounding) for rounding in evidence.roundings],
        "noise": [asdict(step) for step in evidence.noise],
        "master_checks": evidence.master_checks,
        "master_unharmed": evidence.masters_unchanged,
        "live_difference": evidence.live_difference,
        "health": None if evidence.health is None else evidence.health.as_json(),
    }


def _arms(report: SuiteReport) -> dict[str, object]:
    """Each arm's difference from the first one."""
    arms = [(name, experiment.model_dump(mode="json")) for name, experiment in report.arms.items()]
    return {
        name: {key: {"first": a, "this": b} for key, (a, b) in differences(arms[0][1], described).items()}
        for name, described in arms[1:]
    }
