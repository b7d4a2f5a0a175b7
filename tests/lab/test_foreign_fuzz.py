"""Logs of all kinds, damaged: readers and `fp4rl health` read them or answer in one line, never with a traceback."""

import json
import math
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fp4rl.cli.main import main
from fp4rl.lab.foreign.reader import read_log
from fp4rl.lab.foreign.tensorboard import read_tensorboard
from fp4rl.spec.errors import UserError

pytestmark = pytest.mark.fuzz

NUMBERS = st.one_of(
    st.floats(width=64),
    st.floats(0, 1),
    st.integers(-(10**3), 10**3),
    st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 10**400, 2**63]),
)
WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(["\ud800", "[/b]", "a\nb", "'", '"', "\x1b[31m", "step", "loss:"])
)
VALUES = st.one_of(NUMBERS, NUMBERS, NUMBERS, st.none(), st.booleans(), WORDS, st.lists(st.integers(), max_size=2))
NAMES = st.one_of(
    st.sampled_from(
        ["reward", "loss", "entropy", "grad_norm", "accuracy/rollout", "completions/mean_length", "epoch",
         "completions/clipped_ratio", "rewards/x/mean", "critic/score/mean", "critic/score/min", "critic/score/max",
         "actor/entropy", "response_length/mean", "val-core/x/acc/mean@1", "rollout_corr/k3_kl", "frac_reward_zero_std"]
    ),
    WORDS,
)  # fmt: skip
STEPS = st.one_of(st.integers(0, 40), st.integers(), st.floats(), WORDS, st.sampled_from(["3/9", -1, 2**31, 10**30]))
ROWS = st.lists(st.tuples(STEPS, st.dictionaries(NAMES, VALUES, max_size=5)), max_size=25)
_SIGNALS = (
    "reward",
    "entropy",
    "completions/mean_length",
    "grad_norm",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
)
_LINE = st.lists(NUMBERS, min_size=len(_SIGNALS), max_size=len(_SIGNALS))
# Long logs of a few signals, each line drawn, or two levels one after the other: what the monitor has to bear.
COURSES = st.one_of(
    st.lists(_LINE, min_size=8, max_size=40),
    st.tuples(_LINE, _LINE, st.integers(4, 20), st.integers(1, 9)).map(lambda t: [t[0]] * t[2] + [t[1]] * t[3]),
).map(lambda lines: [(step, dict(zip(_SIGNALS, line, strict=True))) for step, line in enumerate(lines)])


def _console(rows) -> str:
    return "".join(f"noise {s}\nstep:{s} - " + " - ".join(f"{k}:{v}" for k, v in r.items()) + "\n" for s, r in rows)


def _table(rows) -> str:
    names = [name for _, row in rows[:1] for name in row]
    return "\n".join([",".join(["step", *names]), *(",".join(map(str, (s, *r.values()))) for s, r in rows)])


WRITERS = {
    "verl.log": _console,
    "verl.jsonl": lambda rows: "\n".join(json.dumps({"step": s, "data": r}) for s, r in rows),
    "flat.jsonl": lambda rows: "\n".join(json.dumps({"step": s, **r}) for s, r in rows),
    "logging.jsonl": lambda rows: "\n".join(json.dumps({**r, "global_step/max_steps": f"{s}/9"}) for s, r in rows),
    "console.log": lambda rows: "\r\n".join(f"  1%| {dict(r, epoch=0.1)}" for _, r in rows),
    "list.json": lambda rows: json.dumps([{"step": s, **r} for s, r in rows]),
    "trainer_state.json": lambda rows: json.dumps({"log_history": [{"step": s, **r} for s, r in rows]}, indent=1),
    "a.csv": _table,
    "metrics.jsonl": lambda rows: "\n".join(json.dumps({"step": s, **r}) for s, r in rows) + "\n",
}
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"])


@st.composite
def damage(draw, data: bytes) -> bytes:
    """Cut, interleaved with random bytes, with bytes changed, doubled, or left as it is."""
    kind = draw(st.sampled_from(["whole", "cut", "insert", "change", "twice", "nul", "shuffled"]))
    at = draw(st.integers(0, len(data)))
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw(st.binary(max_size=40)) + data[at:]
    if kind == "change" and data:
        return data[: at - 1] + draw(st.binary(min_size=1, max_size=1)) + data[at:]
    if kind == "twice":
        return data[at:] + data
    if kind == "nul":
        return data[:at] + b"\0" * 50
    lines = data.split(b"\n")
    return b"\n".join(draw(st.permutations(lines))) if kind == "shuffled" else data


@st.composite
def logs(draw) -> tuple[str, bytes]:
    """(file name, content) of a log of some trainer."""
    name = draw(st.sampled_from(sorted(WRITERS)))
    rows = draw(st.one_of(ROWS, COURSES))
    data = WRITERS[name](rows).encode(draw(ENCODINGS), errors="replace")
    return name, draw(damage(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


def judged(log: Path, *words: str) -> None:
    """`fp4rl health` ends with one of its three codes, and says why in one line where it is not 0."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(["health", str(log), *words])
    assert code in (0, 1, 2)
    assert err.getvalue().count("\n") == (code != 0), err.getvalue()
    out.getvalue().encode()
    if words and out.getvalue():
        json.loads(out.getvalue())


HUGE = "step,reward\n" + "".join(f"{s},{v}\n" for s, v in enumerate([0, 0, 0, 0, 3e154, 5e154, 0, 0]))
EXPLODED = "step,entropy\n" + "".join(f"{s},{v}\n" for s, v in enumerate([0, 1, 1e264, 1e270, *[0] * 6]))


@given(logs())
@example(("a.csv", EXPLODED.encode()))  # a trend towards more than the largest float
@example(("a.csv", HUGE.encode()))  # numbers whose squares are none
def test_a_damaged_log_of_any_kind_is_read_or_refused_in_one_line_and_never_changed(folder, log):
    """Cut, mixed encodings, huge numbers, NaN, interleaved: steps that can be stored, or one line that says why."""
    name, data = log
    place = folder / name
    place.write_bytes(data)
    with suppress(UserError):
        _, joined = read_log(place)
        assert all(0 <= step < 2**31 for step in joined.steps)
        assert all(isinstance(value, float) for values in joined.steps.values() for value in values.values())
        "".join(joined.names).encode()  # names that can be printed and stored
        assert all("\n" not in line for line in joined.remarks())
    judged(place)
    judged(place, "--json")
    assert place.read_bytes() == data


@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused_in_one_line(folder, data):
    """What is no log at all."""
    for name in ("random.log", "events.out.tfevents.1.x", "trainer_state.json"):
        (folder / name).write_bytes(data)
        judged(folder / name)


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    place = tmp_path_factory.mktemp("events")
    writer = EventFileWriter(str(place))
    for step in range(12):
        values = [Summary.Value(tag=tag, simple_value=step / 4) for tag in ("train/reward", "train/loss")]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
    writer.close()
    (file,) = place.iterdir()
    return file.read_bytes()


def _whole_starts(events: bytes) -> list[bytes]:
    """What a writer leaves that is stopped between two records: nothing of it is damaged."""
    ends = [0]
    while ends[-1] < len(events):
        ends.append(ends[-1] + 16 + int.from_bytes(events[ends[-1] : ends[-1] + 8], "little"))
    return [events[:end] for end in ends]


@given(st.data())
def test_damaged_event_files_give_what_stands_before_the_damage_and_say_so(folder, events, data):
    """TensorBoard's files: every step before the damage, none after it."""
    damaged = data.draw(damage(events))
    place = folder / "events.out.tfevents.2.y"
    place.write_bytes(damaged)
    log = read_tensorboard(place)
    assert list(log.in_order()) == list(range(len(log.steps)))
    whole = len(log.steps) == 12 or damaged in _whole_starts(events)
    assert whole or log.remarks()
    judged(place)
