"""The run folder: whole files, appended lines, and what a crash leaves behind."""

import errno
import json
import math
import os
import random
import re
import sqlite3
import struct
from pathlib import Path

import pytest

from fp4rl.lab.files import append_line, is_full, loads, read_lines, remove_partial, whole, write_whole
from fp4rl.lab.folders import RunFolder, all_runs, finished_runs, run_folder
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.records import RunResult, Sites

ROW = {
    "problem_id": "p1",
    "sample": 0,
    "strict": True,
    "flexible": True,
    "formatted": True,
    "completion": "#### 3",
    "length": 4,
    "truncated": False,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_folder(tmp_path, "trial", "bf16-s0-0123456789ab")


def test_metrics_of_one_step_are_joined_and_the_first_value_of_a_key_stays(run: RunFolder):
    run.add_metrics(1, {"reward/mean": 0.5})
    run.add_metrics(1, {"accuracy/test": 0.25, "reward/mean": 0.9})
    assert run.metrics() == {1: {"reward/mean": 0.5, "accuracy/test": 0.25}}


def test_numbers_that_json_has_no_word_for_survive(run: RunFolder):
    run.add_metrics(1, {"loss": math.nan, "ratio": math.inf, "low": -math.inf})
    values = run.metrics()[1]
    assert math.isnan(values["loss"])
    assert (values["ratio"], values["low"]) == (math.inf, -math.inf)


def test_metrics_files_are_strict_json(run: RunFolder):
    run.add_metrics(1, {"loss": math.nan})

    def refuse(word: str) -> float:
        raise AssertionError(word)

    json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=refuse)


def test_a_line_torn_by_a_crash_is_not_read_and_is_cut_off_by_the_next_append(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\n{"a": 2, "b')
    assert list(read_lines(file)) == [{"a": 1}]
    append_line(file, {"a": 3})
    assert list(read_lines(file)) == [{"a": 1}, {"a": 3}]


def test_a_file_that_a_run_which_starts_over_removes_under_its_reader_has_no_lines(tmp_path: Path, monkeypatch):
    run = RunFolder(tmp_path / "suite" / "run")
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # as it was when the reader asked
    assert (run.metrics(), run.evidence(), run.attempts(), run.sites()) == ({}, (), [], Sites())


@pytest.mark.parametrize(
    "line",
    [
        "1e400",
        "-0",
        "-0.0",
        "[NaN, -Infinity]",
        '"\\ud800"',
        '{"a": 1, "a": 2}',
        "12345678901234567890123",
        "[" * 250,
        '{"a": 0.1} ',
        "1.",
        "01",
        "nan",
        '"\t"',
        "[1,]",
        "\ufeff1",
        "1" * 5000,
        "[" * 250 + "]" * 250,
    ],
)
def test_a_line_says_what_python_reads_in_it(line: str):
    def said(read):
        try:
            return repr(read())
        except ValueError as error:
            return type(error), str(error)

    assert said(lambda: loads(line.encode())) == said(lambda: json.loads(line))


def test_numbers_of_lines_are_read_to_the_last_bit():
    draw = random.Random(0)
    bits = (struct.unpack("d", draw.randbytes(8))[0] for _ in range(20_000))
    numbers = [number for number in bits if math.isfinite(number)]
    assert struct.pack(f"{len(numbers)}d", *loads(json.dumps(numbers).encode())) == struct.pack(
        f"{len(numbers)}d", *numbers
    )


def test_a_file_torn_in_its_only_line_starts_anew(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 2, "b')
    append_line(file, {"a": 3})
    assert list(read_lines(file)) == [{"a": 3}]


def test_a_last_line_cut_inside_a_letter_is_left_out_and_no_file_stays_open(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": "' + "é".encode()[:1])
    lines = read_lines(file)
    assert next(lines) == {"a": 1}
    opened = (
        [Path(link).resolve() for link in Path("/proc/self/fd").iterdir()] if Path("/proc/self/fd").is_dir() else []
    )
    assert file.resolve() not in opened
    assert list(lines) == []


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.json"
    write_whole(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(file, "new")
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    "text",
    [
        "seed: {}\n",
        "a: 1\nseed: {}\nb: [x]\n",
        'a: "x\nseed: {}\n"\n"seed": 0\n',  # within another value
        "a: [1,\nseed: {}\n]\n",
        "seed: {}\n  more\n",  # no number
        "seed: 1\nseed: {}\n",
        "seed: {}\n- a\n",
        "a: 1\nseed: {}\n---\nb: 1\n",
        "'x\nseed: {}\n': 1\nb: 1\n",
    ],
)
def test_a_spec_that_repeats_another_is_read_as_if_it_were_alone(run: RunFolder, text: str):
    for seed in (0, 1, 7, 123, "010", "07", "-1", "1.5", "x", "2 # two"):
        run.write_spec(text.format(seed))
        try:
            expected = list(plain_values(text.format(seed), "YAML").items())
        except InvalidValueError as error:
            with pytest.raises(InvalidValueError, match=re.escape(str(error))):
                run.spec()
        else:
            assert list(run.spec().items()) == expected


def test_a_result_is_never_overwritten(run: RunFolder):
    run.write_result(RunResult())
    with pytest.raises(InvalidValueError, match="finished already"):
        run.write_result(RunResult())


def test_an_accuracy_in_percent_is_refused(run: RunFolder):
    with pytest.raises(ValueError, match="strict"):
        run.write_result(RunResult(evaluations=(Evaluation(step=5, strict=67.48),)))
    assert not run.finished


def test_items_come_back_as_they_went_in(run: RunFolder):
    run.write_items(5, "w4a4", [ROW, ROW | {"sample": 1, "strict": False}])
    assert run.items(5, "w4a4").to_pylist() == [ROW, ROW | {"sample": 1, "strict": False}]
    assert run.item_sets() == [(5, "w4a4")]


def test_asking_for_items_that_are_not_there_names_those_that_are(run: RunFolder):
    run.write_items(5, "w4a4", [ROW])
    with pytest.raises(NotFoundError, match="did you mean '5-w4a4'"):
        run.items(5, "w4a5")


def test_only_runs_with_a_result_count_as_finished(tmp_path: Path):
    done, open_ = run_folder(tmp_path, "s", "a-s0"), run_folder(tmp_path, "s", "a-s1")
    done.write_result(RunResult())
    open_.write_spec("seed: 1\n")
    (tmp_path / "s" / "notes").mkdir()
    assert [run.run_id for run in all_runs(tmp_path)] == ["a-s0", "a-s1"]
    assert [run.run_id for run in finished_runs(tmp_path)] == ["a-s0"]


def test_a_name_that_leaves_the_runs_folder_is_refused(tmp_path: Path):
    with pytest.raises(InvalidValueError, match="letters, digits"):
        run_folder(tmp_path, "..", "x")


def test_resuming_forgets_the_steps_after_the_checkpoint(run: RunFolder):
    for step in (1, 2, 3):
        run.add_metrics(step, {"loss": step})
        run.add_rollouts(step, [{"completion": f"<b>{step}"}, {"completion": "\u2028"}])
    run.drop_metrics_after(2)
    assert list(run.metrics()) == [1, 2]
    assert run.rollouts() == {n: [{"completion": f"<b>{n}"}, {"completion": "\u2028"}] for n in (1, 2)}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(tmp_path: Path):
    """Leftovers of a failed write: a full disk, Ctrl-C, text that cannot be encoded."""
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.json", "new \ud800")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "a.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def _interrupted(path: Path) -> None:
    with whole(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt


def test_what_a_killed_process_left_half_written_goes_and_what_another_writes_now_stays(tmp_path: Path):
    """Leftovers of SIGKILL: gone with the next write of that file, or when their run goes on."""
    old, young, other = (tmp_path / f".{name}.partial" for name in ("a.json.123", "a.json.124", "b.json.125"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    write_whole(tmp_path / "a.json", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.json", young.name, other.name])
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "1-full.9.partial").write_text("half")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        sqlite3.OperationalError("database or disk is full"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_however_a_library_says_so(error: Exception):
    """Full disks and quotas: as the system, SQLite, torch and safetensors say it, also as the cause of another."""
    outer = RuntimeError("could not save")
    outer.__context__ = error
    assert is_full(error)
    assert is_full(outer)
    assert not is_full(OSError(errno.EACCES, "Permission denied"))
