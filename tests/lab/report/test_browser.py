"""The page in a real browser: all is drawn, nothing is asked for or thrown, nothing is wider than the window."""

import importlib.util
from pathlib import Path

import pytest

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import planned
from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.html import render

pytest.importorskip("plotly", reason="the extra `report` is not installed")
_FILE = Path(__file__).parents[3] / "tools" / "chromium.py"
_spec = importlib.util.spec_from_file_location("chromium", _FILE)
chromium = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chromium)

HOSTILE = (
    "</script><script>document.body.dataset.taken = 1</script><img src=x onerror='document.body.dataset.taken = 1'>"
)
_ASK = """({
  ground: getComputedStyle(document.body).backgroundColor,
  drawn: [...document.querySelectorAll(".js-plotly-plot")].map((own) => own.id),
  taken: document.body.dataset.taken || null,
  asked: document.querySelector("#rollout-out .asked")?.textContent,
  step: document.getElementById("rollout-label")?.textContent,
})"""
_LAST = """(() => {
  const step = document.getElementById("rollout-step");
  step.value = step.max;
  step.dispatchEvent(new Event("input"));"""


@pytest.fixture
def hostile(make_trial, tmp_path):
    """A page of runs whose questions, problems and answers are markup."""
    comparison = {"question": HOSTILE, "treatment": "w4a16@deployment", "control": "bf16@w4a16"}
    trial = make_trial(comparisons=[comparison | {"factors": ["injection", "evaluation.profiles"]}])
    trial.write()
    for run in planned(trial.suite):
        folder = RunFolder(trial.folder / run.run_id)
        kept = {"problem_id": HOSTILE, "question": HOSTILE, "gold": HOSTILE, "completion": HOSTILE, "reward": 1.0}
        for step in (1, 2):
            folder.add_rollouts(step, [kept | {"strict": True, "tokens": 3, "truncated": False}])
        flags = dict.fromkeys(("strict", "flexible", "formatted", "truncated"), run.arm == "bf16")
        row = {"problem_id": HOSTILE, "sample": 0, "completion": HOSTILE, "length": 3}
        folder.write_items(12, "w4a16" if run.arm == "bf16" else "deployment", [row | flags])
    file = tmp_path / "page.html"
    file.write_text(render(collect(trial.folder)), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.skipif(chromium.BINARY is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width, dark", [(400, False), (400, True), (900, True), (1400, False), (1400, True)])
def test_the_page_is_drawn_within_the_window_asks_for_nothing_and_runs_nobody_elses_code(hostile, width, dark):
    seen = chromium.seen(hostile, width, dark=dark, ask=f"{_LAST} return {_ASK} }})()")
    assert seen.faults == []
    assert seen.requests == []
    assert (seen.width, seen.spill) == (width, 0)
    assert seen.value["ground"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    drawn = {"answers", "accuracy", "curve-0", "curve-1", "curve-2", "sigma", "sites"}
    assert set(seen.value["drawn"]) == drawn
    assert (seen.value["taken"], seen.value["asked"], seen.value["step"]) == (None, HOSTILE, "step 2")
