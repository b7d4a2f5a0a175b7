"""`fp4rl scan` as a user meets it: a table, one HTML file, JSON, advice, and one line for every mistake."""

import json
import subprocess
import sys

import pytest
import yaml
from markupsafe import escape

from fp4rl.cli.described import runs_of
from fp4rl.cli.main import main
from fp4rl.cli.scan import RENAMED
from fp4rl.cli.scan_source import _sorted, described
from fp4rl.diagnose.page import page
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import ScanRequest
from fp4rl.spec.targets import LEFT_BY_DEFAULT


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
    arguments = ["scan", str(folder), "injection=w4a4", "texts=8", "--html", str(html), "--advise", str(advice)]
    assert main([*arguments, "take=[formats, noise]"]) == 0
    shown = capsys.readouterr().out
    assert "14 sites" in shown
    assert "8 texts" in shown
    assert "only 8 calibration texts; use at least 32" in shown
    assert "rank correlation of the one-pass estimate with the measured KL" in shown
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
    assert main(["scan", str(folder), "measured=false", "texts=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scan"]["measured"] is False
    assert found["sensitivity"]["sites"][0]["leave_one_in"] is None
    assert found["sensitivity"]["sites"][0]["estimate"] > 0


def test_a_published_threshold_can_be_changed(folder, capsys):
    def flagged(*options):
        assert main(["scan", str(folder), "weights_only=true", "--json", *options]) == 0
        return {rule["name"]: rule for rule in json.loads(capsys.readouterr().out)["rules"]}["sqnr"]

    strict, mild = flagged(), flagged("limits.sqnr=15")
    assert (len(strict["flagged"]), strict["discriminates"], strict["bands"]) == (14, False, "reconsider_quantization")
    assert (mild["flagged"], mild["limit"], mild["bands"]) == ([], 15.0, "no action")


def test_weights_alone_are_scanned_from_their_files(folder, capsys):
    assert main(["scan", str(folder), "weights_only=true", "format=nvfp4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {part["format"] for part in found["parts"]} == {"nvfp4"}
    assert found["calibration"] is None


def test_an_arm_with_a_fresh_adapter_is_scanned_with_it_and_is_what_it_is_without(folder, tmp_path, capsys):
    """Fault: an arm that merges or packs, and runs, was refused by its scan."""
    file = tmp_path / "spec.yaml"

    def scanned(injection, lora, *words):
        file.write_text(yaml.safe_dump({"model": {"path": str(folder), **lora}, "injection": injection}))
        assert main(["scan", str(file), *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["parts"]

    lora = {"lora": {"rank": 2, "target_modules": ["q_proj"]}}
    everywhere = {"apply_during": {"weight": ["rollout", "training", "evaluation", "reference"]}}
    merged, packed = {"mode": "w4a16", "lora": "merged"}, {"mode": "w4a16", "frozen_base": "packed", **everywhere}
    for words in (["texts=2", "measured=false"], ["weights_only=true"]):
        plain = scanned({"mode": "w4a16"}, {}, *words)
        assert len(plain) == 14
        assert scanned(merged, lora, *words) == plain
        assert scanned(packed, lora, *words) == plain


def test_the_same_folder_twice_is_flagged_with_exit_code_1(folder, capsys):
    assert main(["scan", str(folder), "weights_only=true", "--against", str(folder)]) == 1
    assert "adapters not loaded" in capsys.readouterr().err


def test_two_scans_stand_side_by_side(folder, tmp_path, capsys):
    assert main(["scan", str(folder), "weights_only=true", "--json"]) == 0
    before = tmp_path / "before.json"
    before.write_text(capsys.readouterr().out)
    assert main(["scan", str(folder), "weights_only=true", "format=mxfp8", "--against", str(before)]) == 0
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("weights: SQNR"))
    mxfp4, mxfp8 = (float(cell) for cell in line.split()[-2:])
    assert (mxfp4, mxfp8) == (pytest.approx(18.7, abs=0.3), pytest.approx(31.5, abs=1.5))
    assert "before.json" in shown
    again = ["scan", str(folder), "weights_only=true", "--against", str(before)]
    assert main([*again, "leave=*.layers.0.*"]) == 0  # another question to the same model
    assert main(again) == 1


SUITE = """
suite: s
base: {{model: {{path: "{folder}"}}}}
arms:
  plain: {{}}
  mixed: {{injection: {{mode: w4a4, deployment: compressed_tensors, by_pattern: {{"*.down_proj": mxfp8}}}}}}
  layer1: {{injection: {{mode: w4a16, targets: {{layers: [1]}}}}}}
seeds: [0]
"""


@pytest.fixture
def spec(folder, tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE.format(folder=folder))
    return file


def scanned(capsys, *words):
    assert main(["scan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


MIXED = {"mode": "w4a4", "deployment": "compressed_tensors", "by_pattern": {"*.down_proj": "mxfp8"}}


@pytest.mark.parametrize(
    ("words", "injection"),
    [
        ((), MIXED),
        (("deployment=vllm_blackwell_rceil",), MIXED | {"deployment": "vllm_blackwell_rceil"}),
        (("format=mxfp6_e2m3",), {**MIXED, "mode": None, "weight": "mxfp6_e2m3", "input": "mxfp6_e2m3"}),
        (("arm=layer1",), {"mode": "w4a16", "targets": {"layers": [1]}}),
        (
            ("arm=layer1", "deployment=compressed_tensors"),
            {"mode": "w4a16", "deployment": "compressed_tensors", "targets": {"layers": [1]}},
        ),
        (("arms.mixed.injection.deployment=ocp",), MIXED | {"deployment": "ocp"}),
        (("injection=w4a16",), {"mode": "w4a16"}),
        (("injection.deployment=vllm_blackwell_rceil",), MIXED | {"deployment": "vllm_blackwell_rceil"}),
        (("injection.targets.layers=[1]", "arm=mixed"), MIXED | {"targets": {"layers": [1]}}),
    ],
)
def test_keys_change_a_specs_own_injection_and_keep_the_rest_of_it(spec, capsys, words, injection):
    """The kind: a key that silently throws away what it was to change."""
    found = scanned(capsys, spec, *words, "weights_only=true")
    wanted = Injection.model_validate(injection)
    assert Injection.model_validate(found["injection"]) == wanted
    assert found["model"] == f"suite.yaml, arm {'layer1' if 'arm=layer1' in words else 'mixed'}"
    wide = {part["format"] for part in found["parts"] if part["site"].endswith("down_proj")}
    assert wide == ({"mxfp8"} if wanted.by_pattern else {"mxfp4"})
    assert len(found["parts"]) == (7 if wanted.targets.layers else 14)


def test_several_injections_are_scanned_as_each_alone_is(folder, spec, capsys, tmp_path):
    (tmp_path / "advice.yaml").write_text(f"injection: {json.dumps(MIXED)}\nnoise: {{}}\n")
    named = ("--injection", "mode=w4a16 deployment=ocp", "--injection", str(tmp_path / "advice.yaml"))
    first, second = scanned(capsys, folder, "weights_only=true", *named)
    assert (
        first["parts"]
        == scanned(capsys, folder, "weights_only=true", "injection.mode=w4a16", "deployment=ocp")["parts"]
    )
    assert second["parts"] == scanned(capsys, spec, "arm=mixed", "weights_only=true")["parts"] != first["parts"]
    assert second["model"] == f"{folder.name}, advice"


def test_the_command_that_takes_the_advice_of_an_arm_loads(spec, tmp_path, capsys):
    """Another deployment than the arm's own, so that only the arm itself can take it."""
    advice = tmp_path / "advice.yaml"
    words = ["scan", str(spec), "deployment=vllm_blackwell_rceil", "measured=false", "texts=2", "--advise", str(advice)]
    assert main([*words, "take=[leave, weight_format]"]) == 0
    said = capsys.readouterr().out
    assert f"run with it: fp4rl run {spec} arms.mixed=+{advice}\n" in said
    assert "relative_error: mean |e|/|w|, as the fork defines it; relative_l1: sum|e|/sum|w|" in " ".join(said.split())
    mixed = next(run for run in runs_of(spec, [f"arms.mixed=+{advice}"]) if run.arm == "mixed").experiment.injection
    assert (mixed.deployment, mixed.weight.scale_rule, mixed.by_pattern[0].weight.scale_rule) == (
        "vllm_blackwell_rceil",
        "rceil",
        "rceil",
    )
    assert len(mixed.targets.leave) > len(LEFT_BY_DEFAULT)


def test_keys_may_stand_in_a_file_of_their_own(spec, tmp_path, capsys):
    asked = tmp_path / "scan.yaml"
    asked.write_text("arm: layer1\ndeployment: compressed_tensors\nweights_only: true\nmodel: {dtype: bfloat16}\n")
    found = scanned(capsys, spec, f"+{asked}")
    assert (found["scan"]["arm"], found["injection"]["deployment"], len(found["parts"])) == (
        "layer1",
        "compressed_tensors",
        7,
    )


@pytest.mark.parametrize(("name", "key"), [*RENAMED.items(), *((key, key) for key in ScanRequest.model_fields)])
def test_an_option_of_earlier_versions_is_answered_with_its_key(folder, capsys, name, key):
    assert main(["scan", str(folder), f"--{name.replace('_', '-')}", "x"]) == 2
    assert f"write {key}=" in capsys.readouterr().err
    _sorted([f"{key}=x"], of_spec=True)


def test_a_dtype_and_a_task_are_those_of_the_command_line_whatever_the_arm_says(spec, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("{}")
    words = [
        "arms.mixed.model.dtype=float16",
        "arms.mixed.task={name: arithmetic, difficulty: 3}",
        "model.dtype=bfloat16",
    ]
    found = described(str(spec), [*words, "arm=mixed", "task.name=gsm8k", f"task.path={file}"]).experiment
    assert (found.model.dtype, found.task.name) == ("bfloat16", "gsm8k")


MISTAKES = [
    (["nowhere"], "does not exist"),
    (["{folder}", "injection=w4a17"], "did you mean"),
    (["{folder}", "format=mxfp5"], "did you mean"),
    (["{folder}", "injection.mode=none", "format=mxfp4"], "name another mode"),
    (["{folder}", "take=noises"], "'noise'"),
    (["{folder}", "take=noise"], "add --advise FILE"),
    (["{folder}", "noise_rule=inverted", "--advise", "x.yaml"], "'inverse'"),
    (["{folder}", "bits=4", "--advise", "x.yaml"], "mxfp4 itself takes 4.25 bits a weight"),
    (["{folder}", "deployment=vllm_hoper"], "did you mean 'vllm_hopper'"),
    (["{folder}", "model.dtype=float46"], "float16"),
    (["{folder}", "training.steps=3"], "is no spec file"),
    (["{spec}", "arm=mixd"], "has no arm 'mixd'; did you mean 'mixed'"),
    (["{spec}", "trainin.steps=3"], "did you mean 'training'"),
    (["{folder}", "measurd=false"], "did you mean 'measured'"),
    (["{folder}", "arm=w4a4"], "is no spec file"),
    (["{folder}", "injection=none"], "name a mode"),
    (["{folder}", "text={text}", "task.name=arithmetic"], "both name what to calibrate on"),
    (["{folder}", "text=gone.txt"], "no such file"),
    (["{folder}", "--against", "gone.json"], "does not exist"),
    (["{folder}", "--against", "{text}"], "is no JSON of `fp4rl scan --json`"),
    (["embedded", "--against", "{folder}"], "the embedded model has no files to compare"),
    (["embedded", "weights_only=true"], "is scanned without it"),
    (["{folder}", "weights_only=true", "measured=false"], "measured needs the model"),
    (["{empty_folder}"], "has no config.json"),
    (["{folder}", "text={empty}"], "empty"),
    (["{folder}", "limits.snr=18"], "'sqnr'"),
    (["{folder}", "limits.sqnr=x"], "expected a number"),
    (["{folder}", "task.name=gsm8k"], "task.path"),
    (["{folder}", "weights_only=true", "--advise", "x.yaml"], "--advise needs the model"),
    (["{folder}", "leave=*.qproj"], "*.q_proj"),
    (["{folder}", "--injection", "w4a4", "injection.mode=w4a4"], "both say what is scanned"),
    (["{folder}", "--injection", "mode=none"], "nothing to scan"),
    (["{folder}", "--injection", "w4a4", "--injection", "w4a8", "--advise", "x.yaml"], "2 injections are named"),
    (["{folder}", "--injection", "{text}"], "write NAME=FILE.yaml"),
]


@pytest.mark.parametrize(("arguments", "cure"), MISTAKES)
def test_every_mistake_is_one_line_with_the_cure(folder, spec, tmp_path, capsys, arguments, cure):
    words = _words(arguments, folder, spec, tmp_path)
    assert main(["scan", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert cure in error
    assert len(error.splitlines()) == 1


def _words(arguments, folder, spec, place):
    empty, text, empty_folder = place / "empty.txt", place / "text.txt", place / "empty"
    empty.write_text("\n")
    text.write_text("some words\n")
    empty_folder.mkdir(exist_ok=True)
    places = {"folder": folder, "spec": spec, "empty": empty, "text": text, "empty_folder": empty_folder}
    return [word.format(**places) for word in arguments]


NEED_THE_MODEL = {"*.q_proj"}


def test_mistakes_are_answered_before_torch_is_imported(folder, spec, tmp_path):
    """The kind: seconds of imports before a word of the command line is looked at."""
    mistakes = [_words(arguments, folder, spec, tmp_path) for arguments, cure in MISTAKES if cure not in NEED_THE_MODEL]
    program = (
        "import sys\nfrom fp4rl.cli.main import main\n"
        f"for words in {mistakes!r}:\n"
        "    assert main(['scan', *words]) == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_page_shows_every_figure_and_escapes_names(w4a4):
    from dataclasses import replace

    text = page(replace(w4a4, model="<b>odd</b>"))
    for name in ("heat", "kl", "depth", "distribution"):
        assert f'<div id="{name}" role="img"' in text
    assert "<b>odd</b>" not in text
    assert "default-src 'none'" in text  # it can load nothing


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_a_scan_s_page_is_drawn_in_a_browser_within_the_window(w4a4, drawn, width):
    body, figures = drawn(page(w4a4), width)
    assert body == '<body data-spill="0">'
    assert figures == {"heat", "kl", "depth", "distribution"}


def test_the_figures_of_a_scan_are_what_plotly_accepts(w4a4):
    from fp4rl.diagnose.page import figures_of

    go = pytest.importorskip("plotly.graph_objects")
    figures = figures_of(w4a4)
    assert [figure.id for figure in figures] == ["heat", "kl", "depth", "distribution"]
    for figure in figures:
        go.Figure(data=figure.data, layout=figure.layout)


def test_the_page_carries_the_advice_and_the_sites_of_a_finding(w4a4, trained):
    from fp4rl.diagnose.advice import advise
    from fp4rl.diagnose.findings import findings

    advice = advise(w4a4, trained)
    text = page(w4a4, advice)
    assert f"Advice: {advice.strategy}" in text
    assert all(escape(reason) in text for reason in advice.reasons)
    assert any(found.named_sites() for found in findings(w4a4))
    assert all(found.named_sites() in text for found in findings(w4a4))
