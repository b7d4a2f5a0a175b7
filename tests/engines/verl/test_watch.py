"""What the driver makes of its workers' reports: metrics, the record, and a refusal where something did not act."""

import json
import math
from dataclasses import replace

import pytest

from fp4rl.engines.verl.policy import Report, Streamed
from fp4rl.engines.verl.watch import RunWatch
from fp4rl.lab.files import read_lines
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import Injected, LayerNoise, RolloutNoise
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import PlannedSite, Sites, read_engine_run

SITES = Sites(digest="0123456789ab", plans=(PlannedSite(site="a"), PlannedSite(site="b")), left_out=())
SPEC = Experiment.model_validate({"injection": "w4a16", "noise": {}, "training": {"steps": 2}, "engine": "verl"})


def streamed(step, **changes):
    sent = Streamed(step, "rollout", 9, 2, 64, 2, 0.05 / (step + 1), 0.05, 0.9, 3)
    return replace(sent, **changes)


def noise(step):
    sizes = {"sigma": 0.05, "drawn": 0.05, "realised": 0.05, "share_changed": 0.9, "swallowed": 1, "elements": 8}
    layers = (LayerNoise(layer=0, **sizes),)
    return RolloutNoise(step=step, sigma=0.05, weights=3, elements=8, share_changed=0.9, swallowed=1, layers=layers)


def report(step, trained=True, **changes):
    counts = {"rollout/weight": 64, **({"training/weight": 128} if trained else {})}
    made = Report(SITES, {"weight": 2}, 100, counts, streamed(step), (noise(step),))
    return replace(made, **changes)


@pytest.fixture
def watch(tmp_path):
    said = []
    made = RunWatch(SPEC, tmp_path, 2, 0, say=said.append)
    made.said = said
    return made


ROUNDS = Experiment.model_validate({"injection": "w4a8", "training": {"steps": 2}, "engine": "verl"})


def test_rollout_engines_that_rounded_no_input_end_the_run(tmp_path):
    watch = RunWatch(ROUNDS, tmp_path, 2, 0, say=lambda line: None)
    watch.opened([report(0, trained=False)] * 2)
    counts = {"rollout/weight": 64, "training/weight": 128, "training/input": 8}
    one, other = report(1, counts=counts), report(1, counts=counts | {"rollout/input": 8})
    with pytest.raises(CheckFailed, match="step 1: input acts in rollouts, and verl's rollout engines rounded no val"):
        watch.stepped(1, [one, one])
    own = watch.stepped(1, [one, other])  # one of two engines got no problem
    assert own["fp4rl/elements/rollout/input"] == 8


def test_a_run_leaves_metrics_health_and_a_record(watch, tmp_path):
    watch.opened([report(0, trained=False)] * 2)
    assert watch.said[0].startswith("fp4rl: 2 sites on each of 2 ranks, 0 left out, 100 parameters trained")
    rows = (
        Injected(
            phase="training", site="a", point="weight", calls=4, elements=32, share_changed=0.5, looks=1, missed=0
        ),
    )
    for step in (1, 2):
        own = watch.stepped(step, [report(step)] * 2)
        # the noise that this step sampled with is that of the stream before it
        assert (own["fp4rl/stream/step"], own["fp4rl/noise/sigma"]) == (step - 1, 0.05 / step)
        assert (own["fp4rl/sites"], own["fp4rl/ranks"], own["fp4rl/elements/training/weight"]) == (2, 2, 256)
        verdict = watch.judged(step, {"actor/entropy": 1.0, "actor/grad_norm": 0.5, **own})
        assert verdict == {"fp4rl/health/state": 0.0, "fp4rl/health/alarms": 0.0}
    watch.closed([replace(report(2), evidence=(), rows=rows, final_weights="abc")] * 2)
    run = read_engine_run(json.loads((tmp_path / "fp4rl_run.json").read_text()))
    assert (run.steps_done, run.summary.final_weights, run.summary.sites) == (2, "abc", 2)
    assert (run.summary.noise.rollouts, run.summary.noise.largest_sigma) == (3, 0.05)
    assert (run.summary.health.state, run.summary.processes, run.summary.calls) == ("ok", 2, {"training": 8})
    injected = [line for line in run.lines if isinstance(line, Injected)]
    assert [(line.calls, line.elements, line.share_changed) for line in injected] == [(8, 64, 0.5)]
    assert len((tmp_path / "fp4rl_metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "reports, why",
    [
        ([], "no worker reported: the plug-in was not applied"),
        ([report(0, streamed=None)], "no weights were streamed by the plug-in"),
        ([report(0, streamed=streamed(0, elements=0))], "the stream rounded no value of any weight"),
        ([report(0, streamed=streamed(0, noisy_weights=0))], "the stream put noise on no weight"),
        ([report(0), report(0, sites=Sites(digest="other", plans=()))], "rank 1 has other sites"),
        ([report(0), report(0, trainable=101)], "rank 1 has other sites or trained parameters"),
    ],
    ids=["no report", "no stream", "nothing rounded", "no noise", "other sites", "other parameters"],
)
def test_a_run_whose_first_weights_show_no_plugin_does_not_begin(watch, reports, why):
    with pytest.raises(CheckFailed, match=why):
        watch.opened(reports)


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"counts": {"rollout/weight": 64}}, "step 1: weight acts at 2 sites in training, and rank 1 rounded no value"),
        ({"streamed": streamed(0)}, "hold the weights of after step 0, and 1 steps are done"),
    ],
)
def test_a_step_in_which_something_did_not_act_ends_the_run(watch, wrong, why):
    watch.opened([report(0, trained=False)] * 2)
    good = report(1)
    with pytest.raises(CheckFailed, match=why):
        watch.stepped(1, [replace(good, **wrong) if "streamed" in wrong else good, replace(good, **wrong)])


def test_an_arm_that_does_nothing_to_weights_needs_no_stream_of_the_plugin(tmp_path):
    plain = Experiment.model_validate({"engine": "verl", "training": {"steps": 2}})
    watch = RunWatch(plain, tmp_path, 2, 0, say=[].append)
    empty = report(0, sites=Sites(digest=None), active={}, counts={}, streamed=None, evidence=())
    watch.opened([empty] * 2)
    assert watch.stepped(1, [empty] * 2) == {"fp4rl/sites": 0, "fp4rl/ranks": 2, "fp4rl/trainable": 100}


def test_a_resumed_run_knows_the_health_and_the_noise_of_its_first_part(watch, tmp_path):
    watch.opened([report(0, trained=False)])
    for step in (1, 2):
        watch.stepped(step, [report(step)])
        watch.judged(step, {"actor/grad_norm": math.nan if step == 1 else 1.0})
    again = RunWatch(SPEC, tmp_path, 2, 1, say=[].append)
    again.opened([report(1, trained=False)])
    again.stepped(2, [report(2)])
    assert again.judged(2, {"actor/grad_norm": 1.0})["fp4rl/health/alarms"] == 1.0  # that of step 1
    again.closed([replace(report(2), evidence=())])
    run = read_engine_run(json.loads((tmp_path / "fp4rl_run.json").read_text()))
    assert run.summary.noise.rollouts == 4  # after steps 0 and 1, and again after 1, which was sent anew, and 2
    assert [line["step"] for line in read_lines(tmp_path / "fp4rl_metrics.jsonl")] == [1, 2]


def test_an_alarm_is_printed_written_and_ends_the_run_where_it_must(watch, tmp_path):
    watch.opened([report(0, trained=False)])
    watch.stepped(1, [report(1)])
    verdict = watch.judged(1, {"actor/grad_norm": math.nan})
    assert verdict == {"fp4rl/health/state": 2.0, "fp4rl/health/alarms": 1.0}
    assert watch.stopped
    assert any("not_a_number alarm" in line for line in watch.said)
    assert '"check": "not_a_number"' in (tmp_path / "fp4rl_evidence.jsonl").read_text()
