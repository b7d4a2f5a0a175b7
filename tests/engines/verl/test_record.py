"""The files that a verl run leaves, read back as the ledger reads them."""

import json
import math

import numpy as np

from fp4rl.engines.verl.record import EVIDENCE, METRICS, RUN, RunRecord
from fp4rl.lab.files import read_lines
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import MasterCheck, Rounded
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import Sites, Summary, read_evidence, read_result, read_sites

SPEC = Experiment.model_validate({"injection": "w4a16", "seed": 5})
SITES = Sites(digest="0123456789ab", plans=(), left_out=())


def test_a_finished_run_reads_back_as_a_result_with_its_spec_and_sites(tmp_path):
    record = RunRecord(tmp_path, SPEC, SITES, steps=2)
    record.write("running", Summary())
    assert json.loads((tmp_path / RUN).read_text())["state"] == "running"
    for step in (1, 2):
        record.step(step, {"actor/loss": np.float32(0.5), "note": "no number"}, Summary(sites=3))
    run = json.loads((tmp_path / RUN).read_text())
    result = read_result(run["result"])
    assert (run["state"], result.steps_asked, result.steps_done, result.seed) == ("finished", 2, 2, 5)
    assert result.spec_digest == digest(SPEC) == digest(Experiment.model_validate(run["spec"]))
    assert (result.evidence.sites, read_sites(run["sites"]).digest) == (3, "0123456789ab")
    assert list(read_lines(tmp_path / METRICS)) == [{"step": s, "actor/loss": 0.5} for s in (1, 2)]


def test_a_resumed_run_drops_the_steps_that_it_takes_again_and_a_fresh_one_drops_all(tmp_path):
    lines = [Rounded(phase="rollout", sites=3, step=step) for step in (0, 1, 2)]
    first = RunRecord(tmp_path, SPEC, SITES, steps=3)
    first.add([*lines, MasterCheck(phase="rollout", unchanged=True)])
    for step in (1, 2):
        first.step(step, {"loss": math.nan}, Summary())
    RunRecord(tmp_path, SPEC, SITES, steps=3, begun=1)
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1]
    assert [read_evidence(line) for line in read_lines(tmp_path / EVIDENCE)] == [
        *lines[:2],
        MasterCheck(phase="rollout", unchanged=True),
    ]
    RunRecord(tmp_path, SPEC, SITES, steps=3)
    assert not list(read_lines(tmp_path / EVIDENCE)) + list(read_lines(tmp_path / METRICS))


def test_a_run_that_broke_off_says_why(tmp_path):
    RunRecord(tmp_path, SPEC, SITES, steps=3).write("failed", Summary(), "no layer was rounded")
    run = json.loads((tmp_path / RUN).read_text())
    assert (run["state"], run["why"], run["result"]["steps_done"]) == ("failed", "no layer was rounded", 0)
