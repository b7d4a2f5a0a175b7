"""The files that a verl run leaves, read back as the ledger reads them."""

import json
import math

import numpy as np

from fp4rl.engines.verl.record import EVIDENCE, RunRecord
from fp4rl.lab.files import read_lines
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import MasterCheck, Rounded
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import ENGINE_METRICS, ENGINE_RUN, Sites, Summary, read_engine_run, read_evidence

SPEC = Experiment.model_validate({"injection": "w4a16", "seed": 5, "engine": "verl"})
SITES = Sites(digest="0123456789ab", plans=(), left_out=())


def test_a_finished_run_reads_back_with_its_spec_sites_and_evidence(tmp_path):
    record = RunRecord(tmp_path, SPEC, SITES, steps=2)
    lines = [Rounded(phase="rollout", sites=3, step=0), MasterCheck(phase="rollout", step=0, unchanged=True)]
    record.add(lines)
    for step in (1, 2):
        record.step(step, {"actor/loss": np.float32(0.5), "note": "no number", "list": [1, 2]})
    assert not (tmp_path / ENGINE_RUN).exists()
    record.finish(Summary(sites=3, masters_unchanged=True))
    run = read_engine_run(json.loads((tmp_path / ENGINE_RUN).read_text()))
    assert (run.engine, run.steps_asked, run.steps_done, run.seed) == ("verl", 2, 2, 5)
    assert digest(Experiment.model_validate(run.spec)) == digest(SPEC)
    assert (run.summary.sites, run.summary.masters_unchanged, run.sites.digest) == (3, True, "0123456789ab")
    assert list(run.lines) == lines
    assert list(read_lines(tmp_path / ENGINE_METRICS)) == [{"step": s, "actor/loss": 0.5} for s in (1, 2)]


def test_a_resumed_run_drops_the_steps_that_it_takes_again_and_a_fresh_one_drops_all(tmp_path):
    lines = [Rounded(phase="rollout", sites=3, step=step) for step in (0, 1, 2)]
    first = RunRecord(tmp_path, SPEC, SITES, steps=3)
    first.add([*lines, MasterCheck(phase="rollout", unchanged=True)])
    for step in (1, 2):
        first.step(step, {"loss": math.nan})
    first.finish(Summary())
    RunRecord(tmp_path, SPEC, SITES, steps=3, begun=1)
    assert not (tmp_path / ENGINE_RUN).exists()
    assert [line["step"] for line in read_lines(tmp_path / ENGINE_METRICS)] == [1]
    assert [read_evidence(line) for line in read_lines(tmp_path / EVIDENCE)] == [
        *lines[:2],
        MasterCheck(phase="rollout", unchanged=True),
    ]
    RunRecord(tmp_path, SPEC, SITES, steps=3)
    assert not list(read_lines(tmp_path / EVIDENCE)) + list(read_lines(tmp_path / ENGINE_METRICS))
