"""Three fake steps through the path of a run: what they recorded passes, and each planted defect in it fails."""

from dataclasses import replace

import pytest
import yaml

from fp4rl.cli.described import runs_described
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.foreign.tensorboard import read_tensorboard
from fp4rl.lab.preflight import copies, live, steps
from fp4rl.lab.preflight.rows import Subject
from fp4rl.lab.sinks import TensorBoardSink
from fp4rl.noise import perturb, targets
from fp4rl.noise.schedule import ScheduleProgress, asked_sigma
from fp4rl.spec.evidence import Injected, LiveCheck, MasterCheck, RolloutNoise
from fp4rl.spec.load import load_spec
from fp4rl.spec.transforms import Transformed
from planted import small

NOISE = {"schedule": {"kind": "constant", "sigma": 0.05}}
ARM = {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}, "noise": NOISE}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A subject whose steps were taken: rounded weights and inputs, noise on norms, a start that answers some."""
    root = tmp_path_factory.mktemp("preflight")
    (root / "suite.yaml").write_text(
        yaml.safe_dump({"suite": "trial", "seeds": [0], "base": small.SMALL, "arms": {"a": ARM}})
    )
    described = load_spec(root / "suite.yaml")
    own = Subject(described, runs_described(described, "trial"), root / "runs")
    steps.tried(own)
    return own


@pytest.fixture
def changed(whole, monkeypatch):
    """`changed(run=..., exported=...)` puts these in the place of what the steps left."""

    def change(lines=None, **parts):
        ((arm, own),) = steps.tried(whole).items()
        run = own.run if lines is None else replace(own.run, lines=lines(own.run.lines))
        monkeypatch.setitem(steps.tried.kept, whole, {arm: replace(own, run=run, **parts)})

    return change


def of_kind(kind, **keys):
    """A change of all lines of evidence of one kind."""
    return lambda lines: tuple(line.model_copy(update=keys) if isinstance(line, kind) else line for line in lines)


def verdicts(checked):
    return [row.verdict for row in checked]


@pytest.mark.parametrize("check", [check.name for check in steps.CHECKS])
def test_steps_that_go_well_pass_every_check(check, whole, rows):
    (row,) = rows(steps, check, whole)
    assert row.verdict == ("pass" if check != "spread" else row.verdict)


def test_the_evidence_is_that_of_three_steps(whole, rows):
    (own,) = steps.tried(whole).values()
    assert sorted(own.run.curves) == [1, 2, 3]
    (row,) = rows(steps, "noise", whole)
    assert row.measured.endswith("in 9 draws")  # the two layers and the final norm, three times
    assert not (whole.root / "tried-a").exists()


def test_noise_of_another_size_fails(whole, rows, changed):
    line = next(line for line in steps.tried(whole)["a"].run.lines if isinstance(line, RolloutNoise))
    halved = tuple(layer.model_copy(update={"drawn": layer.drawn / 2}) for layer in line.layers)
    changed(of_kind(RolloutNoise, layers=halved))
    (row,) = rows(steps, "noise", whole)
    assert row.verdict == "fail"
    assert row.measured.startswith("realised over asked 0.")


LINEAR = {"kind": "linear", "sigma_start": 0.05, "sigma_end": 0.01}
UNWIRED = {
    "a step that is never advanced": (
        (ScheduleProgress, "sigma", lambda self, noise, step: asked_sigma(noise, 0, self.total)),
        {"schedule": LINEAR},
        "realised over asked 0.9",
    ),
    "factors that never reach the sampler": (
        (targets, "multiplier_at", lambda *_: 1.0),
        NOISE | {"multipliers": {"by_layer": {0: 2.0}}},
        "realised over asked 0.4",
    ),
}


@pytest.mark.parametrize("which", UNWIRED)
def test_noise_that_is_not_what_the_description_asks_for_fails(which, subject, rows, monkeypatch):
    """Kind: a knob wired to nothing; what the run says that it asked for agrees with what it drew."""
    (holder, name, unwired), described, measured = UNWIRED[which]
    (row,) = rows(steps, "noise", subject(a={"noise": described}))
    assert row.verdict == "pass"
    monkeypatch.setattr(holder, name, unwired)
    (row,) = rows(steps, "noise", subject(a={"noise": described}))
    assert row.verdict == "fail"
    assert row.measured.startswith(measured)


def test_steps_that_stop_themselves_fail_with_the_reason(subject, rows, monkeypatch):
    """Noise that is drawn at a tenth of its size is stopped by the rollout itself."""
    drawn = perturb.standard_noise
    monkeypatch.setattr(perturb, "standard_noise", lambda *which: 0.1 * drawn(*which))
    (row,) = rows(steps, "steps", subject(a={"noise": NOISE}))
    assert row.verdict == "fail"
    assert "times the size that was asked for" in row.measured


def test_a_start_whose_answers_all_earn_the_same_fails(subject, rows):
    """Without a warm-up no answer is right, so that no group has any spread."""
    own = subject()
    (row,) = rows(steps, "spread", own)
    assert row.verdict == "fail"
    assert row.measured.startswith("no group differs in 3 steps")


def test_masters_that_a_rollout_changed_fail(whole, rows, changed):
    changed(of_kind(MasterCheck, unchanged=False))
    assert verdicts(rows(steps, "rollouts", whole)) == ["fail"]


def test_a_live_policy_that_is_not_the_saved_one_fails(whole, rows, changed):
    changed(of_kind(LiveCheck, max_difference=0.1))
    (row,) = rows(steps, "live", whole)
    assert (row.verdict, row.cure) == ("fail", "a rounded copy went stale")


def test_metrics_that_an_export_drops_fail(whole, rows, changed):
    kept = steps.tried(whole)["a"].exported
    changed(exported={step: {n: v for n, v in line.items() if n != "reward/mean"} for step, line in kept.items()})
    (row,) = rows(steps, "curves", whole)
    assert row.verdict == "fail"
    assert row.measured.endswith("3 lost, such as reward/mean")


def test_an_exporter_that_joins_names_fails(whole, rows, changed, tmp_path):
    """One curve hides another where `a/b` and `a_b` are one name; the files are written and read back."""
    for name, joined in (("sound", str), ("joined", lambda tag: tag.partition("/")[0])):
        sink = TensorBoardSink(RunFolder(tmp_path / name))
        for step, line in steps.tried(whole)["a"].run.curves.items():
            sink.log(step, {joined(tag): value for tag, value in line.items()})
        sink.close()
        changed(exported=read_tensorboard(tmp_path / name / "tensorboard").steps)
        assert verdicts(rows(steps, "curves", whole)) == ["pass" if name == "sound" else "fail"]


def test_a_start_that_is_too_large_is_stood_in_for(whole, subject, rows, monkeypatch):
    """The injection, the noise and the loss are the arm's own; what only the start can show waits for it."""
    (folder,) = (path for path in (whole.root / "models").iterdir() if (path / "config.json").is_file())
    monkeypatch.setattr(live, "LARGEST", 10)
    own = subject({"model": {"path": str(folder)}}, a=ARM | {"training": {"algorithm": "grpo"}})
    (taken,) = steps.tried(own).values()
    assert taken.stand_in
    assert taken.run.spec["injection"]["mode"] == "w4a4"
    assert taken.run.spec["training"]["algorithm"] == "grpo"
    assert "on the embedded model in its place" in rows(steps, "steps", own)[0].measured
    assert verdicts(rows(steps, "spread", own)) == ["waits"]


def test_a_start_without_weights_waits_for_them(subject, rows, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    own = subject({"model": {"path": str(tmp_path)}}, a=ARM)
    assert verdicts(rows(steps, "steps", own)) == ["waits"]
    assert rows(steps, "noise", own) == ()


KEYS = {
    "changing": ARM | {"injection": ARM["injection"] | {"schedule": {"weight": {"from_step": 9, "over": 6}}}},
    "turned": ARM | {"model": {"transforms": [{"name": "rotate_residual"}]}},
    "hopping": ARM | {"training": {"oscillation": {"dampen": 1e-3}}},
    "clamped": ARM | {"training": {"learned_clipping": {}}},
    "averaged": ARM | {"training": {"ema": {"decay": 0.9, "rounds": True}}},
    "later": ARM | {"start": {"arm": "first"}},
}


def test_what_the_newer_keys_do_is_tried_too(subject, rows):
    """Each leaves its own evidence in three steps: all stages of a schedule, a transform, codes that flip."""
    own = subject(None, None, (), first={}, **KEYS)
    taken = steps.tried(own)
    assert {name: tried.error or tried.waits or tried.run.gaps for name, tried in taken.items()} == dict.fromkeys(
        taken, ()
    )
    runs = {name: tried.run for name, tried in taken.items()}
    stages = {row.stage or "after" for row in runs["changing"].of(Injected) if row.point == "weight"}
    assert stages == {"blend", "after"}  # none before: not rounded
    assert runs["turned"].of(Transformed)[-1].difference is not None
    assert "weights/oscillating" in runs["hopping"].curves[3]
    assert 0 < runs["clamped"].curves[3]["weights/clipped"] < 0.1
    assert runs["averaged"].spec["training"]["ema"]["rounds"]
    assert taken["later"].stand_in == copies.UNTRAINED


def test_what_a_teacher_has_yet_to_learn_is_waited_for(subject, rows):
    taught = {"training": {"distillation": {"teacher": {"arm": "a"}}}}
    own = subject(a={}, b=taught)
    assert steps._try("b", own.arms["b"], own.root).waits == "it takes weights that another run has yet to train"
