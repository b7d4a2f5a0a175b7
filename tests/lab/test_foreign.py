"""Foreign logs: every step and key comes through colours, prefixes, overwritten lines, repeats and broken bytes."""

import json
import math
from pathlib import Path

import pytest

from fp4rl.lab.folders import finished_runs, run_folder
from fp4rl.lab.foreign.joined import plain_lines
from fp4rl.lab.foreign.reader import import_log, read_log
from fp4rl.lab.foreign.records import read_trl, read_verl
from fp4rl.lab.foreign.tensorboard import read_tensorboard
from fp4rl.lab.sinks import TensorBoardSink
from fp4rl.spec.errors import InvalidValueError, NotFoundError

PREFIX = "\x1b[36m(TaskRunner pid=20910)\x1b[0m "


def test_the_shared_verl_log_gives_its_106_steps_with_all_keys(shared_data: Path):
    data = (shared_data / "logs" / "grpo_like_healthy_verl.log").read_bytes()
    log = read_verl(data)
    assert list(log.in_order()) == list(range(106))
    assert len(log.names) == 53
    # Counted apart from the reader: every " - " of a step line introduces one key.
    lines = [
        line for line in data.decode().replace("\r", "\n").split("\n") if ") \x1b[0mstep:" in line or " step:" in line
    ]
    keys = sum(line.count(" - ") for line in lines if "/" in line and " - " in line)
    assert sum(len(values) for values in log.steps.values()) == keys
    assert log.remarks() == []
    assert log.steps[0] == {"val-core/openai/gsm8k/reward/mean@1": 0.212}
    assert log.steps[105]["val-core/openai/gsm8k/reward/mean@1"] == 0.880
    assert log.steps[105]["perf/throughput"] == 382.540


def test_colours_and_worker_prefixes_are_taken_off():
    line = f"{PREFIX}\x1b[1mstep:3\x1b[0m - actor/\x1b[32mentropy\x1b[0m:0.5 - actor/lr:1e-06\n"
    assert read_verl(line.encode()).steps == {3: {"actor/entropy": 0.5, "actor/lr": 1e-6}}


def test_the_prefix_of_another_worker_in_the_middle_of_a_line_ends_it():
    line = "step:3 - actor/lr:0.5(WorkerDict pid=7, ip=10.0.0.2) step:4 - actor/lr:0.25\n"
    assert read_verl(line.encode()).steps == {3: {"actor/lr": 0.5}, 4: {"actor/lr": 0.25}}


def test_a_progress_bar_that_is_overwritten_by_carriage_returns_hides_no_step():
    text = "Training:   1%|  | 1/105\rTraining:   2%|\rstep:2 - actor/lr:0.5\rTraining: 3%\r\nstep:3 - actor/lr:1\r\n"
    assert read_verl(text.encode()).steps == {2: {"actor/lr": 0.5}, 3: {"actor/lr": 1.0}}


def test_a_second_line_of_a_step_adds_its_keys_and_the_later_of_two_values_stands():
    text = "step:5 - actor/lr:0.5 - critic/score/mean:0.25\nstep:5 - val-core/x/mean@1:0.75 - actor/lr:9\n"
    log = read_verl(text.encode())
    assert log.steps == {5: {"actor/lr": 9, "critic/score/mean": 0.25, "val-core/x/mean@1": 0.75}}
    assert log.remarks() == ["1 number was met twice: the later one counts"]


def test_bytes_that_are_no_utf8_do_not_lose_the_line_they_stand_in():
    data = b"\xff\xfe answer \xc3( step:1 - actor/lr:0.5 - actor/\xe9t:2\nstep:2 - actor/lr:0.25\n"
    log = read_verl(data)
    assert log.steps[1] == {"actor/lr": 0.5, "actor/�t": 2.0}
    assert log.steps[2] == {"actor/lr": 0.25}


def test_numbers_as_newer_versions_print_them_are_read():
    text = "step:1 - a/x:np.float64(0.5) - a/y:tensor(2.) - a/z:nan - a/w:-inf - a/v:1e-07\n"
    values = read_verl(text.encode()).steps[1]
    assert math.isnan(values.pop("a/z"))
    assert values == {"a/x": 0.5, "a/y": 2.0, "a/w": -math.inf, "a/v": 1e-7}


def test_what_is_no_number_is_listed_and_not_dropped_in_silence():
    log = read_verl(b"step:1 - a/x:0.5 - a/y:None\n")
    assert (log.steps, log.skipped) == ({1: {"a/x": 0.5}}, ["step 1: a/y: None"])


def test_an_answer_that_talks_of_a_step_is_no_step():
    text = "Let me go step:1 - first: add 3\nglobal_step:7 - a/x:1\nsubstep:1 - a/x:2\nstep:2 - a/x:1\n"
    assert read_verl(text.encode()).steps == {2: {"a/x": 1.0}}


def test_ray_marks_of_repeated_lines_are_cut_off():
    assert list(plain_lines(b"step:1 - a/x:1 [repeated 7x across cluster]\n")) == ["step:1 - a/x:1"]


def test_a_trainer_state_joins_the_entries_of_a_step():
    history = [
        {"step": 1, "loss": 0.5, "epoch": 0.1},
        {"step": 1, "eval_reward": 0.25},
        {"step": 2, "loss": 0.25, "x": None},
    ]
    log = read_trl(json.dumps({"log_history": history}).encode())
    assert log.steps == {1: {"loss": 0.5, "epoch": 0.1, "eval_reward": 0.25}, 2: {"loss": 0.25}}
    assert log.skipped == ["step 2: x: None"]


def test_json_of_another_form_is_refused():
    with pytest.raises(InvalidValueError, match="log_history"):
        read_trl(b'{"steps": []}')
    with pytest.raises(InvalidValueError, match=r"no whole JSON .*line 1"):
        read_trl(b'{"log_history": [')


def test_event_files_of_a_resumed_run_keep_every_step_and_the_later_value(tmp_path: Path):
    run = run_folder(tmp_path, "s", "r")
    for steps, value in (((1, 2, 3, 4, 5), 0.5), ((3, 4), 0.25)):
        sink = TensorBoardSink(run)
        for step in steps:
            sink.log(step, {"loss": value})
        sink.close()
    log = read_tensorboard(run.path / "tensorboard")
    assert log.in_order() == {1: {"loss": 0.5}, 2: {"loss": 0.5}, 3: {"loss": 0.25}, 4: {"loss": 0.25}}
    assert (log.went_back, log.met_twice, log.left_behind) == ([(5, 3)], 2, 1)


def test_what_a_restarted_writer_logged_counts_and_what_it_left_behind_is_said(tmp_path: Path):
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag="loss", simple_value=step)])))
    writer.add_event(Event(step=2, session_log=SessionLog(status=SessionLog.START)))
    writer.add_event(Event(step=2, summary=Summary(value=[Summary.Value(tag="loss", simple_value=9.0)])))
    writer.close()
    log = read_tensorboard(tmp_path)
    assert log.steps == {1: {"loss": 1.0}, 2: {"loss": 9.0}}
    assert (log.went_back, log.met_twice, log.left_behind) == ([(3, 2)], 1, 1)


def test_event_files_with_float32_scalars_as_torch_writes_them_are_read(tmp_path: Path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    writer.add_event(Event(step=3, summary=Summary(value=[Summary.Value(tag="loss", simple_value=0.5)])))
    writer.close()
    assert read_tensorboard(tmp_path).steps == {3: {"loss": 0.5}}


def test_a_folder_of_several_runs_asks_for_one_of_them(tmp_path: Path):
    for name in ("a", "b"):
        sink = TensorBoardSink(run_folder(tmp_path, "s", name))
        sink.log(1, {"loss": 1.0})
        sink.close()
    with pytest.raises(InvalidValueError, match="holds 2 runs"):
        read_tensorboard(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nothing here\n", b"\x00\x01\x02"])
def test_a_file_without_any_step_is_refused_with_the_known_forms(tmp_path: Path, content: bytes):
    file = tmp_path / "x.log"
    file.write_bytes(content)
    with pytest.raises(InvalidValueError, match="known are verl logs"):
        read_log(file)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(NotFoundError, match="no such file"):
        read_log(tmp_path / "x.log")


def test_an_imported_log_is_a_finished_run_with_the_numbers_of_the_log(tmp_path: Path, shared_data: Path):
    source = shared_data / "logs" / "grpo_like_healthy_verl.log"
    found = import_log(source, tmp_path, arm="gpg", seed=1)
    assert finished_runs(tmp_path) == [found.run]
    assert found.run.metrics() == read_verl(source.read_bytes()).in_order()
    result = found.run.result()
    assert (result.arm, result.seed, result.steps_done) == ("gpg", 1, 105)
    assert [e.strict for e in result.evaluations if e.last] == [0.880]


def test_importing_the_same_log_twice_gives_one_run(tmp_path: Path):
    file = tmp_path / "train.log"
    file.write_text("step:1 - a/x:1\n")
    first, second = import_log(file, tmp_path / "runs"), import_log(file, tmp_path / "runs")
    assert (first.already_there, second.already_there) == (False, True)
    assert len(finished_runs(tmp_path / "runs")) == 1
