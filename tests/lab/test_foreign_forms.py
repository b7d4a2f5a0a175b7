"""The forms that trainers log in, each as its trainer writes it; right values are those that the text itself shows."""

import json
import math
from pathlib import Path

import pytest

from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.reader import read_log
from fp4rl.spec.errors import NotFoundError

RIGHT = {1: {"loss": 0.5, "reward": 0.25}, 2: {"loss": 0.25, "reward": 0.5}}

# verl 0.9 (verl/utils/tracking.py, FileLogger): orjson, one object a line.
VERL_FILE = """{"step":1,"data":{"loss":0.5,"reward":0.25}}
{"step":2,"data":{"loss":0.25,"reward":0.5}}
"""
FLAT = """{"step": 1, "loss": 0.5}
{"step": 1, "reward": 0.25}
{"loss": 0.25, "global_step": 2, "reward": "0.5"}
"""
# ms-swift's ProgressCallbackNew appends what it shows to logging.jsonl, and a summary of another form at the end.
SWIFT = """{"loss": 0.5, "reward": 0.25, "global_step/max_steps": "1/2"}
{"loss": 0.25, "reward": 0.5, "global_step/max_steps": "2/2"}
{"last_model_checkpoint": "/out/checkpoint-2", "best_model_checkpoint": null, "global_step": 2, "log_history": []}
"""
# transformers' PrinterCallback and ProgressCallback: older ones print numbers, those since 5.0 strings of four digits.
PRINTED = """  0%|          | 0/2 [00:00<?, ?it/s]\r                    \r{'loss': 0.5, 'reward': 0.25, 'epoch': 0.5}
 50%|#####     | 1/2 [00:01<00:01]\r
{'loss': '0.25', 'reward': '0.5', 'epoch': '1'}
{'eval_loss': 0.125, 'epoch': 1.0}
{'train_runtime': 3.5, 'train_loss': 0.375, 'epoch': 1.0}
"""
CSV = "Step,loss,reward\n1,0.5,0.25\n2,0.25,0.5\n"
SEMICOLONS = "step;loss;reward\r\n1;0,5;0,25\r\n2;0,25;0,5\r\n"
LONG = "step\tmetric\tvalue\n1\tloss\t0.5\n2\tloss\t0.25\n1\treward\t0.25\n2\treward\t0.5\n"
WANDB = '"Step","a-run - loss","a-run - loss__MIN","a-run - reward"\n1,0.5,0.4,0.25\n2,0.25,0,0.5\n'


def read(tmp_path: Path, content: str | bytes, name: str = "a.log") -> tuple[str, Joined]:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_log(file)


@pytest.mark.parametrize(
    "form, content",
    [
        ("json", VERL_FILE),
        ("json", FLAT),
        ("json", f"[{', '.join(FLAT.splitlines())}]"),
        ("table", CSV),
        ("table", SEMICOLONS),
        ("table", LONG),
        ("table", WANDB),
        ("trl", json.dumps({"log_history": [{"step": s, **values} for s, values in RIGHT.items()]}, indent=2)),
        ("verl", "step:1 - loss:0.5 - reward:0.25 - a/b:1\nstep:2 - loss:0.25 - reward:0.5 - a/b:1\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_form_is_told_by_its_content_and_gives_the_numbers_it_shows(tmp_path, form, content, encoding):
    """Every form of log, in every encoding that tools write text in."""
    found, log = read(tmp_path, content.encode(encoding))
    steps = {step: {k: v for k, v in values.items() if k != "a/b"} for step, values in log.in_order().items()}
    assert (found, steps, log.remarks()) == (form, RIGHT, [])


def test_ms_swifts_log_counts_by_its_own_step_and_lists_what_is_no_number(tmp_path):
    """A step that is written 'n/of'."""
    form, log = read(tmp_path, SWIFT, "logging.jsonl")
    assert (form, log.in_order()) == ("json", RIGHT)
    assert len(log.skipped) == 3


def test_printed_dicts_are_numbered_and_that_is_said(tmp_path):
    """A log that names no steps: its lines in order; an evaluation and the summary belong to the step before."""
    form, log = read(tmp_path, PRINTED)
    steps = {step: {k: v for k, v in values.items() if k in RIGHT[1]} for step, values in log.in_order().items()}
    assert (form, steps) == ("printed", RIGHT)
    assert log.steps[2]["eval_loss"] == 0.125
    assert log.steps[2]["train_loss"] == 0.375
    assert "names no steps" in log.remarks()[0]


def test_printed_dicts_of_a_trainer_that_was_started_again_go_back_with_the_epoch(tmp_path):
    """Two attempts in a log without steps: where `epoch` goes back, so does the number."""
    lines = [(0.25, 1.0), (0.5, 2.0), (0.75, 3.0), (0.5, 20.0), (0.75, 30.0), (1.0, 40.0)]
    _, log = read(tmp_path, "".join(f"{{'loss': {loss}, 'epoch': {epoch}}}\n" for epoch, loss in lines))
    assert {step: values["loss"] for step, values in log.in_order().items()} == {1: 1.0, 2: 20.0, 3: 30.0, 4: 40.0}


def test_dicts_that_tell_of_no_step_are_no_steps(tmp_path):
    """What else a console prints as a dict: configurations, answers of the model."""
    noise = "{'lr': 1e-6, 'batch': 8}\nmodel says {\"answer\": 18}\n"
    _, log = read(tmp_path, noise + "{'loss': 0.5, 'epoch': 0.1}\n" + noise)
    assert log.steps == {1: {"loss": 0.5, "epoch": 0.1}}


def test_what_is_not_finite_is_kept_as_such_in_every_form(tmp_path):
    """NaN and infinity, which verl's file logger writes as null and others as words or as literals."""
    for content in (
        '{"step":1,"data":{"loss":null,"x":1e400}}\n',
        '{"step": 1, "loss": NaN, "x": Infinity}\n',
        '{"step": 1, "loss": "nan", "x": "inf"}\n',
        "{'step': 1, 'loss': nan, 'x': np.float64(inf)}\n",
        "step,loss,x\n1,nan,inf\n",
        "step:1 - a/b:1 - loss:nan - x:inf\n",
        f'{{"step": 1, "loss": NaN, "x": 1{"0" * 400}}}\n',
    ):
        _, log = read(tmp_path, content)
        assert math.isnan(log.steps[1]["loss"]), content
        assert log.steps[1]["x"] == math.inf, content


def test_a_line_that_was_cut_off_costs_itself_alone_and_is_counted(tmp_path):
    """Torn lines, of a crash or of two writers at once."""
    _, log = read(tmp_path, VERL_FILE + '{"step":3,"data":{"lo')
    assert log.in_order() == RIGHT
    assert log.remarks() == ["1 no number: 1 line without a whole record"]


@pytest.mark.parametrize("value", [-1, 2**40, 1.5, True, None, "three", [1]])
def test_what_is_no_step_makes_none(tmp_path, value):
    """Steps that are negative, beyond the ledger's column, fractions, flags or words."""
    _, log = read(tmp_path, f'{{"step": {json.dumps(value)}, "loss": 9}}\n{{"step": 2, "loss": 0.25}}\n')
    assert log.steps == {2: {"loss": 0.25}}
    assert len(log.skipped) == 1


def attempts(first: range, second: range) -> list[tuple[int, dict[str, float]]]:
    """Rows of two attempts at one run: every number of the second is 100 more, its learning rate is the same."""
    rows = [(step, {"loss": float(step), "kl": step / 2, "lr": 0.1}) for step in first]
    return rows + [(step, {"loss": step + 100.0, "kl": step + 100.0, "lr": 0.1}) for step in second]


FORMS = {
    "verl": lambda rows: "".join(
        f"step:{s} - a/b:1 - " + " - ".join(f"{k}:{v}" for k, v in r.items()) + "\n" for s, r in rows
    ),
    "json": lambda rows: "".join(json.dumps({"step": s, **r}) + "\n" for s, r in rows),
    "trl": lambda rows: json.dumps({"log_history": [{"step": s, **r} for s, r in rows]}),
    "printed": lambda rows: (
        "noise\nmore\n" * 9
        + "".join(f"{{'step': {s}, 'loss': {r['loss']}, 'kl': {r['kl']}, 'lr': 0.1}}\n" for s, r in rows)
    ),
    "table": lambda rows: "step,loss,kl,lr\n" + "".join(f"{s},{r['loss']},{r['kl']},{r['lr']}\n" for s, r in rows),
}


@pytest.mark.parametrize("form", FORMS)
def test_of_two_attempts_in_one_log_the_later_one_counts_and_the_numbers_met_twice_are_counted(tmp_path, form):
    """Steps that go back: 1 to 6, then 4 to 8. Steps 4, 5 and 6 with three numbers each are met twice (verl: four)."""
    found, log = read(tmp_path, FORMS[form](attempts(range(1, 7), range(4, 9))))
    assert found == form
    losses = {step: values["loss"] for step, values in log.in_order().items()}
    assert losses == {1: 1.0, 2: 2.0, 3: 3.0, 4: 104.0, 5: 105.0, 6: 106.0, 7: 107.0, 8: 108.0}
    assert (log.met_twice, log.left_behind) == (12 if form == "verl" else 9, 0)
    assert log.remarks()[0] == "the steps go back once, from 6 to 4: the later attempt counts"


def test_a_later_attempt_is_seen_although_most_of_its_numbers_are_constants():
    """Lines of which one number in six changes, as those of a small run."""
    log, constant = Joined(), dict.fromkeys("abcde", 1.0)
    for step, loss in [*((s, 0.5) for s in range(1, 9)), *((s, 0.25) for s in range(5, 7))]:
        log.row(step, {"loss": loss, **constant})
    assert {step: values["loss"] for step, values in log.in_order().items()} == {
        **dict.fromkeys(range(1, 5), 0.5),
        **dict.fromkeys(range(5, 7), 0.25),
    }
    assert (log.went_back, log.met_twice, log.left_behind) == ([(8, 5)], 12, 12)


def test_a_folder_without_a_log_is_refused_with_the_known_forms(tmp_path):
    """Folders in which there is nothing to read."""
    with pytest.raises(NotFoundError, match=r"no log of a known form in this folder; .*verl logs"):
        read_log(tmp_path)


def test_what_the_later_attempt_never_came_to_is_left_out_and_counted():
    """A later attempt that is the shorter one: the earlier one's end belongs to a policy that is gone."""
    log = Joined()
    for step, values in attempts(range(1, 9), range(4, 6)):
        log.row(step, values)
    assert list(log.in_order()) == [1, 2, 3, 4, 5]
    assert (log.met_twice, log.left_behind) == (6, 9)


def test_a_validation_before_the_first_step_of_a_new_attempt_leaves_the_step_it_starts_from():
    """verl validates the checkpoint it goes on from, under that checkpoint's step."""
    log = Joined()
    for step in (1, 2, 3, 4):
        log.row(step, {"loss": step, "kl": step, "lr": step})
        log.row(step, {"val/acc": 0.1 * step})
    log.row(2, {"val/acc": 0.25})
    log.row(3, {"loss": 30, "kl": 30, "lr": 30})
    assert log.in_order() == {
        1: {"loss": 1, "kl": 1, "lr": 1, "val/acc": 0.1},
        2: {"loss": 2, "kl": 2, "lr": 2, "val/acc": 0.25},
        3: {"loss": 30, "kl": 30, "lr": 30},
    }
    assert (log.met_twice, log.left_behind) == (4, 5)


def test_a_second_pass_over_the_steps_with_other_names_is_no_second_attempt():
    """Steps that go back without a number that comes again: tables in long form, logs of several writers."""
    log = Joined()
    for name in ("a", "b", "c"):
        for step in range(1, 5):
            log.row(step, {name: step, "epoch": step / 4, "lr": 0.1})
    assert log.in_order() == {s: {"a": s, "b": s, "c": s, "epoch": s / 4, "lr": 0.1} for s in range(1, 5)}
    assert log.went_back == []


def test_a_folder_is_read_by_the_log_in_it(tmp_path):
    """A TRL checkpoint, a folder of checkpoints (the last by number), ms-swift's output."""
    for step in (2, 10):
        place = tmp_path / "out" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        history = [{"step": s, "loss": s / 4} for s in range(1, step + 1)]
        (place / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert max(read_log(tmp_path / "out" / "checkpoint-2")[1].steps) == 2
    assert max(read_log(tmp_path / "out")[1].steps) == 10
    (tmp_path / "swift").mkdir()
    (tmp_path / "swift" / "logging.jsonl").write_text(SWIFT)
    assert read_log(tmp_path / "swift")[1].in_order() == RIGHT
