"""Scan, advice, run: the multipliers and formats that were advised are the ones the run's evidence shows."""

import json

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.model import Embedded

SPEC = """
model: {{path: {folder}}}
injection: w4a4
noise: {{schedule: {{kind: geometric, num_stages: 3, sigma_start: 0.05, sigma_end: 0.02}}}}
training: {{steps: 3, train_batch_size: 4, mini_batch_size: 4, rollout_n: 2, max_response_length: 16,
           filter_groups: {{enable: false}}, overlong_buffer: {{len: 4}}}}
evaluation: {{count: 8, max_new_tokens: 16}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    build(Embedded(seed=5, num_layers=3, hidden_size=128), tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.slow
def test_a_run_under_advice_shows_the_advised_multipliers_and_formats_per_layer(folder, tmp_path):
    spec, advice = tmp_path / "spec.yaml", tmp_path / "advice.yaml"
    spec.write_text(SPEC.format(folder=folder))
    scanned = ["scan", str(folder), "injection=w4a4", "measured=false", "bits=5", "take=[formats, noise]"]
    scanned += ["--advise", str(advice)]
    assert main(scanned) == 0
    assert main(["run", str(spec), f"+{advice}", "--runs", str(tmp_path / "runs")]) == 0

    advised = yaml.safe_load(advice.read_text())
    (run,) = (tmp_path / "runs").glob("*/*/result.json")
    rows = advised["injection"]["by_pattern"]  # a row names what it widens: weights, inputs or both
    formats = {row["pattern"]: (row.get("weight", "mxfp4"), row.get("input", "mxfp4")) for row in rows}
    plans = {row["site"]: row for row in json.loads((run.parent / "sites.json").read_text())["plans"]}
    assert formats
    for site, plan in plans.items():
        assert (plan.get("weight"), plan.get("input")) == formats.get(site, ("mxfp4", "mxfp4"))

    multipliers = advised["noise"]["multipliers"]["by_layer"]
    lines = [json.loads(line) for line in (run.parent / "evidence.jsonl").read_text().splitlines()]
    noisy = [line for line in lines if line["kind"] == "noise" and line["sigma"] > 0]
    assert len(noisy) == 2
    for line in noisy:
        for layer in line["layers"]:
            factor = multipliers.get(layer["layer"], 1.0)
            assert layer["sigma"] == pytest.approx(line["sigma"] * factor)
            # 256 values a layer: one standard error of their spread is 4.4 %
            assert layer["realised"] == pytest.approx(layer["sigma"], rel=0.18)
