"""The page: one file that loads nothing, says what the terminal says, and is written whole."""

import base64
import json
import re
import sys
import zlib

import pytest

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.figures import accuracy, answers, learning
from fp4rl.lab.report.html import render
from fp4rl.spec.errors import NotFoundError
from planted.records import line

offline = pytest.importorskip("plotly.offline", reason="the extra `report` is not installed")
PACKED = '<script type="text/plain" id="plotly">(.*?)</script>'


@pytest.fixture
def faulty(make_trial):
    folder = make_trial().write(missing=[("w4a4", 2)], without_evidence=[("w4a16", 1)], stale=[("w4a16+aqn", 0)])
    return collect(folder)


@pytest.fixture
def page(complete):
    return render(complete)


def without_plotly(page):
    """The page less its packed script."""
    return re.sub(PACKED, "", page)


def test_the_page_loads_nothing_from_anywhere(page):
    own = without_plotly(page)
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:|//[a-z]+\.", own)
    assert "default-src 'none'" in own


def test_plotly_is_inside_once_and_packed(page):
    (packed,) = re.findall(PACKED, page)
    script = zlib.decompress(base64.b64decode(packed)).decode()
    assert script == offline.get_plotlyjs()
    assert page.count("plotly.js v") == 1
    assert len(page) < 2_500_000


def test_every_arm_question_and_run_is_there(page):
    for words in ("w4a16+aqn", "Does noise in the rollout (AQN) help W4A16?", "no difference shown", "6,860 calls"):
        assert words in page


def test_faults_are_named(faulty):
    own = without_plotly(render(faulty))
    for words in ("partial: 11 of 12 runs", "1 stale", "1 without evidence", "it left no evidence", "not recorded"):
        assert words in own


def test_words_of_the_suite_are_escaped(make_trial):
    comparison = {"question": "<script>x</script> & so?", "treatment": "w4a4@full", "control": "bf16@full"}
    own = without_plotly(render(collect(make_trial(comparisons=[comparison]).write())))
    assert "<script>x" not in own
    assert "&lt;script&gt;x&lt;/script&gt; &amp; so?" in own


def test_the_figures_are_what_plotly_accepts(faulty):
    go = pytest.importorskip("plotly.graph_objects")
    figures = [accuracy(faulty), *learning(faulty)]
    assert len(figures) == 5
    for figure in figures:
        go.Figure(data=figure.data, layout=figure.layout)


def test_the_answers_are_drawn_with_interval_and_margin(complete):
    go = pytest.importorskip("plotly.graph_objects")
    figure = answers(complete.questions)
    go.Figure(data=figure.data, layout=figure.layout)
    assert [trace["meta"]["part"] for trace in figure.data] == ["mean", "mean", "mean", "margin"]
    assert figure.data[0]["error_x"]["array"][0] > 0


def test_a_run_that_does_not_count_is_drawn_as_a_cross(faulty):
    crosses = [t for t in accuracy(faulty).data if t["marker"]["symbol"] == "x-thin-open"]
    assert [trace["text"] for trace in crosses] == [["seed 1, not comparable"]] * 2


def test_the_numbers_in_the_page_are_strict_json(page):
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)

    def refuse(word):
        raise AssertionError(word)

    assert {figure["id"] for figure in json.loads(text, parse_constant=refuse)} >= {"answers", "accuracy", "sigma"}


def test_the_same_report_gives_the_same_page(complete, page):
    assert render(complete) == page


def test_a_suite_without_any_finished_run_still_has_a_page(make_trial):
    everything = [(arm, seed) for arm in ("bf16", "w4a16", "w4a16+aqn", "w4a4") for seed in range(3)]
    own = without_plotly(render(collect(make_trial().write(missing=everything))))
    assert "No run is finished." in own


def test_without_the_extra_the_error_names_it(faulty, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(NotFoundError, match=r"pip install 'fp4rl\[report\]'"):
        render(faulty)


def test_master_weights_that_changed_stand_out_on_the_page(make_trial):
    folder = make_trial().write()
    run = RunFolder(next(path.parent for path in folder.glob("w4a16-*/result.json")))
    run.add_evidence(line("master", step=9, unharmed=False))
    (cell,) = re.findall(r"<td[^>]*>CHANGED[^<]*</td>", without_plotly(render(collect(folder))))
    assert 'class="warn"' in cell
