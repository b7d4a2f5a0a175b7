"""The report as plain values for JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fp4rl.lab.compare.difference import differences

if TYPE_CHECKING:
    from fp4rl.lab.report.collect import SuiteReport
    from fp4rl.lab.report.questions import Question
    from fp4rl.lab.report.runs import Run
    from fp4rl.lab.report.scores import Score


def as_dict(report: "SuiteReport") -> dict[str, object]:
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


def _score(score: "Score") -> dict[str, Any]:
    means = ("before", "after", "flexible", "formatted", "formatted_before", "truncated")
    return {
        "arm": score.arm,
        "profile": score.profile,
        "measured_under": [asdict(profile) for profile in score.profiles],
        "problems": score.problems,
        **{name: None if getattr(score, name) is None else asdict(getattr(score, name)) for name in means},
        "of_samples": {name: asdict(mean) for name, mean in score.of_samples.items()},
        "by_seed": [
            {
                "seed": s.seed,
                "run_id": s.run_id,
                "counts": s.counts,
                "stale": s.stale,
                "before": None if s.start is None else s.start.strict,
                "after": None if s.end is None else s.end.strict,
            }
            for s in score.by_seed
        ],
    }


def _question(question: "Question") -> dict[str, Any]:
    return {
        **question.asked.model_dump(mode="json"),
        "word": question.word,
        "sentence": question.sentence(),
        "refused": list(question.refused),
        "verdict": None if question.verdict is None else question.verdict.as_dict(),
    }


def _run(run: "Run") -> dict[str, Any]:
    evidence = run.evidence
    return {
        "run_id": run.planned.run_id,
        "arm": run.planned.arm,
        "seed": run.planned.seed,
        "state": run.state,
        "counts": run.counts,
        "stale": run.stale,
        "code_digest": run.code_digest,
        "gaps": list(run.gaps),
        "versions": dict(run.versions),
        "wall_s": run.wall_s,
        "stopped": run.stopped,
        "evidence": None
        if evidence is None
        else {
            "sites": evidence.sites,
            "sites_digest": evidence.sites_digest,
            "roundings": [asdict(rounding) for rounding in evidence.roundings],
            "noise": [asdict(step) for step in evidence.noise],
            "master_checks": evidence.master_checks,
            "master_unharmed": evidence.master_unharmed,
            "live_difference": evidence.live_difference,
            "health": evidence.health,
        },
    }


def _arms(report: "SuiteReport") -> dict[str, Any]:
    """Each arm's difference from the first one."""
    arms = [(name, experiment.model_dump(mode="json")) for name, experiment in report.arms.items()]
    return {
        name: {key: {"first": a, "this": b} for key, (a, b) in differences(arms[0][1], described).items()}
        for name, described in arms[1:]
    }
