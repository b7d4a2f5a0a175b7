"""`fp4rl scan` as a user meets it: a table, one HTML file, JSON, advice, and one line for every mistake."""

import json
from html import escape

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.diagnose.page import page
from fp4rl.models.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained embedded model: enough for everything but figures."""
    from fp4rl.models.tiny import build
    from fp4rl.spec.model import Embedded

    place = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    build(Embedded(seed=3), tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_scan_prints_layers_and_writes_page_and_advice(folder, tmp_path, capsys):
    html, advice = tmp_path / "scan.html", tmp_path / "advice.yaml"
    arguments = ["scan", str(folder), "--mode", "w4a4", "--texts", "8", "--html", str(html), "--advise", str(advice)]
    assert main([*arguments, "--take", "formats", "--take", "noise"]) == 0
    shown = capsys.readouterr().out
    assert "14 sites" in shown
    assert "8 texts" in shown
    assert "only 8 calibration texts; use at least 32" in shown
    assert "rank correlation of the one-pass estimate with the measured harm" in shown
    assert "reconsider_quantization" in shown
    assert "advice:" in shown
    assert "holds formats and noise; its noise turns AQN on where a spec has none" in " ".join(shown.split())
    assert f"fp4rl run SPEC +{advice}; for one arm of a suite: arms.NAME=+{advice}\n" in shown  # to be copied
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 100
    text = html.read_text()
    assert "<script src" not in text  # one file, nothing from a network
    assert "Layers and projections" in text
    assert set(yaml.safe_load(advice.read_text())) == {"injection", "noise"}


def test_the_json_of_a_scan_is_one_document(folder, capsys):
    assert main(["scan", str(folder), "--quick", "--texts", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sensitivity"]["sites"][0]["alone"] is None
    assert found["sensitivity"]["sites"][0]["estimate"] > 0


def test_a_limit_of_the_documents_can_be_changed(folder, capsys):
    def flagged(*options):
        assert main(["scan", str(folder), "--weights-only", "--json", *options]) == 0
        return {rule["name"]: rule for rule in json.loads(capsys.readouterr().out)["rules"]}["sqnr"]

    strict, mild = flagged(), flagged("--limit", "sqnr=15")
    assert (len(strict["flagged"]), strict["discriminates"], strict["bands"]) == (14, False, "reconsider_quantization")
    assert (mild["flagged"], mild["limit"], mild["bands"]) == ([], 15.0, "no action")


def test_weights_alone_are_scanned_from_their_files(folder, capsys):
    assert main(["scan", str(folder), "--weights-only", "--format", "nvfp4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {part["format"] for part in found["parts"]} == {"nvfp4"}
    assert found["calibration"] is None


def test_the_same_folder_twice_is_flagged_with_exit_code_1(folder, capsys):
    assert main(["scan", str(folder), "--weights-only", "--against", str(folder)]) == 1
    assert "adapters not loaded" in capsys.readouterr().err


def test_two_scans_stand_side_by_side(folder, tmp_path, capsys):
    assert main(["scan", str(folder), "--weights-only", "--json"]) == 0
    before = tmp_path / "before.json"
    before.write_text(capsys.readouterr().out)
    assert main(["scan", str(folder), "--weights-only", "--format", "mxfp8", "--against", str(before)]) == 0
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("weights: SQNR"))
    mxfp4, mxfp8 = (float(cell) for cell in line.split()[-2:])
    assert (mxfp4, mxfp8) == (pytest.approx(18.7, abs=0.3), pytest.approx(31.5, abs=1.5))
    assert "before.json" in shown
    again = ["scan", str(folder), "--weights-only", "--against", str(before)]
    assert main([*again, "--leave", "*.layers.0.*"]) == 0  # another question to the same model
    assert main(again) == 1


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["nowhere"], "does not exist"),
        (["{folder}", "--mode", "w4a17"], "did you mean"),
        (["{folder}", "--format", "mxfp5"], "did you mean"),
        (["{folder}", "--mode", "none", "--format", "mxfp4"], "name another mode"),
        (["{folder}", "--take", "noises"], "did you mean 'noise'"),
        (["{folder}", "--text", "{empty}"], "empty"),
        (["{folder}", "--limit", "snr=18"], "did you mean 'sqnr'"),
        (["{folder}", "--limit", "sqnr"], "write for example sqnr=18"),
        (["{folder}", "--task", "gsm8k"], "--data FILE"),
        (["{folder}", "--weights-only", "--advise", "x.yaml"], "drop --weights-only"),
        (["{folder}", "--leave", "*.qproj"], "*.q_proj"),
    ],
)
def test_every_mistake_is_one_line_with_the_cure(folder, tmp_path, capsys, arguments, cure):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    words = [word.format(folder=folder, empty=empty) for word in arguments]
    assert main(["scan", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert cure in error
    assert len(error.splitlines()) == 1


def test_the_page_shows_every_figure_and_escapes_names(w4a4):
    from dataclasses import replace

    text = page(replace(w4a4, model="<b>odd</b>"))
    for name in ("heat", "harm", "depth", "distribution"):
        assert f'class="figure" id="{name}"' in text
    assert "<b>odd</b>" not in text


def test_the_page_carries_the_advice_and_the_sites_of_a_finding(w4a4, stories):
    from fp4rl.diagnose.advice import advise
    from fp4rl.diagnose.findings import findings

    advice = advise(w4a4, stories)
    text = page(w4a4, advice)
    assert f"Advice: {advice.strategy}" in text
    assert all(escape(reason) in text for reason in advice.reasons)
    assert any(found.places() for found in findings(w4a4))
    assert all(found.places() in text for found in findings(w4a4))
