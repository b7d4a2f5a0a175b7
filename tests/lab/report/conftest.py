"""Synthetic suites for the report: run folders as the runner writes them, with numbers that a real run could have."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import PlannedRun, planned
from fp4rl.lab.provenance import code_digest
from fp4rl.lab.report.collect import SuiteReport, collect
from fp4rl.noise.schedule import asked_sigma
from fp4rl.spec.experiment import Suite
from fp4rl.spec.points import LINEAR_POINTS
from fp4rl.spec.records import read_result, read_sites
from planted.records import line

STEPS, PROBLEMS, SITES = 12, 500, 14
# Accuracy (%) at the last step by arm and profile; the seeds lie around it.
LEVELS = {
    ("bf16", "full"): 92.0,
    ("bf16", "w4a16"): 81.0,
    ("bf16", "w4a4"): 40.0,
    ("w4a16", "full"): 92.5,
    ("w4a16", "deployment"): 91.5,
    ("w4a16+aqn", "full"): 92.0,
    ("w4a16+aqn", "deployment"): 91.0,
    ("w4a4", "full"): 70.0,
    ("w4a4", "deployment"): 62.0,
}
SPREAD = (-1.2, 0.5, 0.9, -0.4, 1.6)
START = {"full": 46.0, "w4a16": 33.2, "w4a4": 9.8}
SUITE: dict[str, Any] = {
    "suite": "trial",
    "seeds": [0, 1, 2],
    "base": {
        "training": {"steps": STEPS},
        "evaluation": {"count": PROBLEMS, "deployment": "compressed_tensors", "profiles": ["full", "deployment"]},
    },
    "arms": {
        "bf16": {"evaluation": {"profiles": ["full", "w4a16", "w4a4"]}},
        "w4a16": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors"}},
        "w4a16+aqn": {
            "injection": {"mode": "w4a16", "deployment": "compressed_tensors"},
            "noise": {"schedule": {"sigma_start": 1e-2, "sigma_end": 1e-4, "num_stages": 6}},
        },
        "w4a4": {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
    },
    "comparisons": [
        {
            "question": "Does training under W4A16 beat quantizing afterwards?",
            "treatment": "w4a16@deployment",
            "control": "bf16@w4a16",
            "factors": ["injection", "evaluation.profiles"],
        },
        {
            "question": "Does noise in the rollout (AQN) help W4A16?",
            "treatment": "w4a16+aqn@deployment",
            "control": "w4a16@deployment",
            "factors": ["noise"],
        },
        {
            "question": "Does the W4A16 policy reach the unquantized one?",
            "treatment": "w4a16@deployment",
            "control": "bf16@full",
            "factors": ["injection", "evaluation.profiles"],
            "test": "reaches",
            "margin": 0.05,
        },
    ],
}


@dataclass
class Trial:
    """A suite on disk: `write` puts its run folders there, with the faults that are asked for by (arm, seed)."""

    folder: Path
    suite: Suite
    levels: dict[tuple[str, str], float] = field(default_factory=lambda: dict(LEVELS))

    def write(
        self,
        *,
        missing: Iterable[tuple[str, int]] = (),
        unfinished: Iterable[tuple[str, int]] = (),
        without_evidence: Iterable[tuple[str, int]] = (),
        stale: Iterable[tuple[str, int]] = (),
        profile: dict[tuple[str, str], dict[str, Any]] | None = None,
    ) -> Path:
        (self.folder / "suite.yaml").write_text(yaml.safe_dump(self.suite.model_dump(mode="json"), sort_keys=False))
        for run in planned(self.suite):
            key = (run.arm, run.seed)
            if key in missing:
                continue
            folder = RunFolder(self.folder / run.run_id)
            folder.write_spec(run.experiment.model_dump_json())
            self._metrics(run, folder)
            if key in unfinished:
                continue
            if key not in without_evidence:
                self._evidence(run, folder)
            result = self._result(run, key in stale, profile or {})
            folder.write_result(read_result(result | ({"evidence": {}} if key in without_evidence else {})))
        return self.folder

    def _metrics(self, run: PlannedRun, folder: RunFolder) -> None:
        draw = random.Random(f"{run.arm}{run.seed}")
        end = self.levels[run.arm, run.experiment.evaluation.profiles[-1 if run.arm != "bf16" else 0]] / 100
        for step in range(1, STEPS + 1):
            part = step / STEPS
            sigma = asked_sigma(run.experiment.noise, step - 1, STEPS) if run.experiment.noise else 0.0
            folder.add_metrics(
                step,
                {
                    "reward/mean": 0.4 + part * (end - 0.45),
                    "accuracy/rollout": 0.42 + part * (end - 0.42) + draw.gauss(0, 0.02),
                    "entropy": 0.09 - 0.05 * part + draw.gauss(0, 0.004),
                    "response_length/mean": 19 + 4 * part + draw.gauss(0, 0.4),
                    "grad_norm": 0.4 + draw.random() / 10,
                    "clip_ratio/high": 0.003 * draw.random(),
                    "sampling/dropped_share": 0.3,
                    "sampling/gen_batches": 1.6,
                    "noise/sigma": sigma,
                },
            )

    def _evidence(self, run: PlannedRun, folder: RunFolder) -> None:
        injection, noise = run.experiment.injection, run.experiment.noise
        points = [p for p in LINEAR_POINTS if injection and getattr(injection, p)]
        names = [f"model.layers.{i // 7}.{'qkvogud'[i % 7]}_proj" for i in range(SITES if points else 0)]
        plans = [{"site": n, "kind": "linear", "role": n[-6], "layer": int(n[13]), "shape": [64, 64]} for n in names]
        plans = [plan | dict.fromkeys(points, "mxfp4") for plan in plans]
        left = [{"site": "lm_head", "kind": "linear", "shape": [59, 64], "reason": "left by *lm_head*"}]
        digest = f"table-{injection.name}" if injection else None
        folder.write_sites(read_sites({"digest": digest, "plans": plans, "left_out": left}))
        for step in range(STEPS):
            folder.add_evidence(line("master", step=step))
            if noise:
                folder.add_evidence(line("noise", step=step, **_noise(asked_sigma(noise, step, STEPS))))
        if noise:
            folder.add_evidence(line("noise_stages", ran=[], missed=[]))
        for phase, calls in (("rollout", 490), ("training", 48)):
            for i, name in enumerate(names):
                for point in points:
                    row = {"share_changed": 0.9 + i / 1000, "relative_error": 0.11 + i / 1000, "looks": 9}
                    place = {"phase": phase, "site": name, "point": point, "format": "mxfp4"}
                    row |= {"calls": calls, "elements": 4096 * calls, "missed": None}
                    folder.add_evidence(line("injection", **place, **row))
        folder.add_evidence(line("live_equals_fresh"))

    def _result(self, run: PlannedRun, stale: bool, changes: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
        sites, calls = (
            (SITES, {"rollout": 490 * SITES, "training": 48 * SITES}) if run.experiment.injection else (0, {})
        )
        evidence = {"sites": sites, "calls": calls, "live_equals_fresh": True, "master_unharmed": True}
        return {
            "run_id": run.run_id,
            "suite": run.suite,
            "arm": run.arm,
            "seed": run.seed,
            "spec_digest": run.spec_digest,
            "code_digest": "0dd000000000" if stale else code_digest(),
            "versions": {"python": "3.11.9", "fp4rl": "0.1.0", "torch": "2.13.0"},
            "evaluations": [
                self._evaluation(run, name, last, changes) for last in (False, True) for name in _profiles(run, last)
            ],
            "evidence": evidence,
            "steps_asked": STEPS,
            "steps_done": STEPS,
            "wall_s": 21.5,
        }

    def _evaluation(
        self, run: PlannedRun, name: str, last: bool, changes: dict[tuple[str, str], dict[str, Any]]
    ) -> dict[str, Any]:
        injection = run.experiment.injection
        precision = name if name not in ("full", "deployment") else "full"
        if name == "deployment" and injection:
            precision = injection.name
        strict = self.levels[run.arm, name] + SPREAD[run.seed % len(SPREAD)] if last else START[precision]
        return {
            "step": STEPS if last else 0,
            "last": last,
            "profile": {
                "name": name,
                "precision": precision,
                "sites_digest": None if precision == "full" else f"table-{precision}",
                "noise": "off",
                "scorer": "arithmetic",
                "max_new_tokens": 48,
                "sampling": "greedy",
                "items_digest": "5f3a9c01d2e4",
                **changes.get((run.arm, name), {}),
            },
            "n": PROBLEMS,
            "strict": strict / 100,
            "flexible": min(1.0, strict / 100 + 0.02),
            "formatted": 0.97,
            "truncated": 0.01,
            "mean_length": 22.4,
        }


def _profiles(run: PlannedRun, last: bool) -> tuple[str, ...]:
    asked = run.experiment.evaluation
    return (*asked.profiles, *(asked.sweep if last else ()))


def _noise(sigma: float) -> dict[str, Any]:
    layers = [
        {"layer": layer, "sigma": sigma, "drawn": sigma, "realised": sigma * factor, "share_changed": float(sigma > 0)}
        | {"swallowed": 0, "elements": 128}
        for layer, factor in ((0, 1.03), (1, 0.96), (None, 1.01))
    ]
    return {"sigma": sigma, "weights": 5, "elements": 384, "share_changed": float(sigma > 0), "layers": layers}


MakeTrial = Callable[..., Trial]


@pytest.fixture
def make_trial(tmp_path: Path) -> MakeTrial:
    """Build a `Trial` below tmp_path; keyword arguments replace keys of SUITE."""

    def make(**changes: Any) -> Trial:
        suite = Suite.model_validate(SUITE | changes)
        folder = tmp_path / suite.suite
        folder.mkdir()
        return Trial(folder, suite)

    return make


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> SuiteReport:
    """The report of a suite without faults."""
    folder = tmp_path_factory.mktemp("complete")
    return collect(Trial(folder, Suite.model_validate(SUITE)).write())
