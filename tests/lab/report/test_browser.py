"""The page in a real browser: every figure is drawn, nothing is refused or thrown, nothing is wider than the window."""

import pytest

from fp4rl.lab.report.html import render

pytest.importorskip("plotly", reason="the extra `report` is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_every_figure_is_drawn_without_an_error_and_within_the_window(complete, drawn, width):
    body, figures = drawn(render(complete), width)
    assert body == '<body data-spill="0">'
    assert figures == {"answers", "accuracy", "curve-0", "curve-1", "curve-2", "sigma"}
