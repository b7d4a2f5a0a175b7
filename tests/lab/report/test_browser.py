"""The page in a real browser: every figure is drawn, nothing is refused or thrown, nothing is wider than the window."""

import re
import shutil
import subprocess

import pytest

from fp4rl.lab.report.html import render

pytest.importorskip("plotly", reason="the extra `report` is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
PROBE = """<script>
addEventListener("error", (event) => { document.body.dataset.error = event.message; });
addEventListener("securitypolicyviolation", (event) => { document.body.dataset.error = event.violatedDirective; });
addEventListener("load", () => {
  const page = document.documentElement;
  document.body.dataset.spill = page.scrollWidth - page.clientWidth;
});
</script></head>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_every_figure_is_drawn_without_an_error_and_within_the_window(complete, tmp_path, width):
    file = tmp_path / "page.html"
    file.write_text(render(complete).replace("</head>", PROBE, 1))
    own = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--disable-component-update"]
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS.split(),
            *own,
            "--disable-sync",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{file}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body
    assert body[0] == '<body data-spill="0">'
    drawn = re.findall(r'<div id="(answers|accuracy|curve-\d|sigma)"[^>]*class="[^"]*js-plotly-plot', done.stdout)
    assert set(drawn) == {"answers", "accuracy", "curve-0", "curve-1", "curve-2", "sigma"}
