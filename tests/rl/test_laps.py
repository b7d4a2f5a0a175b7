"""Where the time of a step goes: laps that add up, from the trainer to the table of `--profile`."""

import io
import json

import pytest
from rich.console import Console

from fp4rl.cli.main import main
from fp4rl.cli.profile_view import profiled
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.profile import WHAT, seconds_a_step, write_profile
from fp4rl.rl.step_metrics import StepTimer
from fp4rl.spec.errors import NotFoundError


def test_every_moment_belongs_to_the_lap_that_ends_next():
    clock = iter([0.0, 1.0, 3.0, 7.0, 8.0])
    laps = StepTimer(lambda: next(clock))
    laps.lap("a")
    laps.lap("b")
    laps.restart()  # 3 to 7 belongs to nothing
    laps.lap("a")
    assert laps.take() == {"a": 2.0, "b": 2.0}
    assert laps.take() == {}


def test_the_laps_of_a_step_are_known_and_add_up_to_it(run, experiment):
    training = {"kl_loss_coef": 0.1, "distillation": {"coef": 0.5}, "steps": 2}
    _, heard = run(experiment("w4a4", training=training))
    for _, metrics in heard.steps:
        laps = {name: s for name in WHAT if (s := metrics.get(f"time/{name}_s")) is not None}
        assert set(laps) == set(WHAT)
        assert sum(laps.values()) - laps["between"] == pytest.approx(metrics["time/step_s"], rel=0.02)
        assert 0 < metrics["time/cpu_s"] <= 1.1 * metrics["time/step_s"]  # `run` computes with a single thread


def folder_of(tmp_path, *steps):
    folder = RunFolder(tmp_path / "suite" / "run")
    for number, times in enumerate(steps, start=1):
        folder.add_metrics(number, {f"time/{name}_s": seconds for name, seconds in times.items()})
    return folder


def test_the_first_step_is_left_out_and_the_longest_comes_first(tmp_path):
    folder = folder_of(
        tmp_path, {"backward": 100.0}, {"generation": 3.0, "backward": 1.0}, {"generation": 3.0, "backward": 1.0}
    )
    assert list(write_profile(folder).items()) == [("generation", 3.0), ("backward", 1.0)]
    assert "| generation | 3.0000 | 75.0% | sampling the answers |" in (folder.path / "profile.md").read_text()


def test_a_run_without_times_says_so(tmp_path):
    with pytest.raises(NotFoundError, match="suite/run has logged no times"):
        seconds_a_step(folder_of(tmp_path, {}))


def test_arms_stand_side_by_side_in_80_columns(tmp_path, experiment):
    runs = [PlannedRun("suite", arm, seed, experiment(seed=seed)) for arm in ("bf16", "w4a4") for seed in (0, 1)]
    for run, seconds in zip(runs, (1.0, 3.0, 5.0, 5.0), strict=True):
        folder = run_folder(tmp_path, run.suite, run.run_id)
        folder.add_metrics(1, {"time/generation_s": seconds, "time/teacher_s": 0.0})
    screen = Console(width=80, record=True, file=io.StringIO())
    screen.print(profiled(runs, tmp_path, 80))
    text = screen.export_text()
    assert "2.000 100%" in text
    assert "5.000 100%" in text
    assert "teacher" not in text


def test_many_arms_are_tables_that_fit_below_each_other_with_every_cell_whole(tmp_path, experiment):
    """The kind: a table that is as wide as what the user describes, cut by the terminal (`2.0...`)."""
    arms = [f"w4a16+aqn+strategy{number}" for number in range(14)]
    runs = [PlannedRun("suite", arm, 0, experiment(seed=number)) for number, arm in enumerate(arms)]
    for number, run in enumerate(runs):
        folder = run_folder(tmp_path, run.suite, run.run_id)
        folder.add_metrics(1, {"time/generation_s": 10.0 + number, "time/comparison_s": 0.1})
    screen = Console(width=80, record=True, file=io.StringIO())
    screen.print(profiled(runs, tmp_path, screen.width))
    text = screen.export_text()
    assert all(f" {arm} " in text for arm in arms)
    assert all(f" {10 + n}.000 {(10 + n) / (10.1 + n):.0%} " in text for n in range(14))
    assert text.count("generation") == 6  # 19 letters and a frame of 3 go thrice into 80 - 14 columns, 20 letters twice
    assert text.count("Where a step goes") == text.count("each run's own table") == 1
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_run_shows_the_profile_on_request(experiment, model_cache, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "models").symlink_to(model_cache)
    spec = tmp_path / "trial.json"
    spec.write_text(json.dumps(experiment("bf16").model_dump(mode="json")))
    assert main(["run", str(spec), "--runs", str(tmp_path / "runs"), "--jobs", "1", "--profile"]) == 0
    assert "generation" in capsys.readouterr().out
    (written,) = (tmp_path / "runs").glob("*/*/profile.md")
    assert "backward and gradient clipping" in written.read_text()
