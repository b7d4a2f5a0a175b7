"""The report in the terminal: it fits, it says the words, and it takes nothing for markup."""

import io

import pytest
from rich.console import Console

from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.terminal import terminal


def shown(report, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal(report, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_it_fits_and_cuts_nothing_off(make_trial, width):
    text = shown(collect(make_trial().write(missing=[("w4a4", 2)])), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_the_table_holds_means_intervals_and_words(complete):
    text = shown(complete, 80)
    assert "91.6 [88.8, 94.3]" in text
    assert "+10.5 [+8.0, +13.0]" in text
    assert "bf16, then w4a16" in text
    for word in ("better", "reaches", "12 of 12 runs"):
        assert word in text


def test_a_wide_terminal_also_shows_the_start_and_the_format_rate(complete):
    assert all(name not in shown(complete, 80) for name in ("step 0 ", "flexible"))
    assert all(name in shown(complete, 120) for name in ("step 0 ", "flexible", "p (Holm)"))


def test_an_arm_that_is_not_comparable_shows_no_number(make_trial):
    report = collect(make_trial().write(without_evidence=[("w4a4", seed) for seed in range(3)]))
    line = next(line for line in shown(report, 80).splitlines() if line.startswith("w4a4 "))
    assert line.split() == ["w4a4", "0", "of", "3", "not", "comparable", "not", "comparable"]


def test_words_of_the_suite_are_never_taken_for_markup(make_trial):
    comparison = {"question": "Is [bold]a[/bold] [/red] better?", "treatment": "w4a4@full", "control": "bf16@full"}
    text = shown(collect(make_trial(comparisons=[comparison]).write()), 120)
    assert "Is [bold]a[/bold] [/red] better?" in text


def test_an_arm_that_rounds_nothing_was_not_deployed(make_trial):
    """Kind: a number under a heading that it was not measured under; `full 46.0 | 46.0` in the two columns."""
    suite = {
        "arms": {"bf16": {}, "w4a16": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors"}}},
        "comparisons": [],
    }
    trial = make_trial(**suite)
    trial.levels[("bf16", "deployment")] = 92.0
    text = shown(collect(trial.write()), 80)
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.startswith(("bf16 ", "w4a16 "))}
    assert rows["bf16"] == "-"
    assert rows["w4a16"] == "94.3]"
