"""What a sink exports equals what was logged; W&B and MLflow run offline where they are installed."""

import json
import math
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.foreign.tensorboard import read_tensorboard
from fp4rl.lab.guards import locked
from fp4rl.lab.heartbeat import beating
from fp4rl.lab.sinks import Sinks, allowed_name, close_left_open
from fp4rl.spec.errors import InvalidValueError, NotFoundError

LOGGED = {
    0: {"val-core/gsm8k/mean@1": 0.1 + 0.2, "loss": math.nan},
    1: {"loss": 1e-300, "reward/mean": 2 / 3, "lr": 1e-6},
    7: {"loss": -math.inf, "reward/mean": 0.5},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_folder(tmp_path, "trial", "bf16-s0-0123456789ab")


def _log_all(run: RunFolder, *asked: str) -> Sinks:
    sinks = Sinks(run, asked, {"seed": 0})
    with sinks:
        for step, values in LOGGED.items():
            half = len(values) // 2
            sinks.log(step, dict(list(values.items())[:half]))
            sinks.log(step, dict(list(values.items())[half:]))
    return sinks


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def test_tensorboard_exports_what_was_logged_to_the_last_bit(run: RunFolder):
    _log_all(run)
    found = read_tensorboard(run.path / "tensorboard").in_order()
    assert {step: sorted(values) for step, values in found.items()} == {s: sorted(v) for s, v in LOGGED.items()}
    assert all(_same(found[step][name], value) for step, values in LOGGED.items() for name, value in values.items())


def test_tensorboards_thread_starts_with_the_first_step(run: RunFolder):
    # accelerate clears the environment while the trainer is made: no thread may be there to read it.
    def writers():
        return [thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboard")]

    with Sinks(run) as sinks:
        assert not writers()
        sinks.log(0, {"x": 1.0})
        assert writers()


def test_tensorboard_itself_shows_the_numbers_as_scalars(run: RunFolder):
    pytest.importorskip("tensorboard")
    from tensorboard import context
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    _log_all(run)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(run.path / "tensorboard")).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(run.path))
    shown = provider.read_scalars(
        context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=100, run_tag_filter=None
    )
    values = [(datum.step, datum.value) for datum in shown["."]["reward/mean"]]
    assert values == [(1, 2 / 3), (7, 0.5)]


@pytest.mark.parametrize("resumed", [False, True], ids=["rollback", "resume"])
def test_tensorboard_itself_shows_one_course_of_a_run_that_went_back(run: RunFolder, resumed: bool):
    """Two attempts in one log: steps 3 to 5 of the first one are gone, for TensorBoard and for our own reader."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    sinks = Sinks(run)
    for step, value in [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5), (3, 30.0), (4, 40.0)]:
        if resumed and value == 30.0:
            sinks.close()
            sinks = Sinks(run)
        sinks.log(step, {"loss": value})
        sinks.log(step, {"reward": -value})  # a second line of a step is no second attempt
    sinks.close()
    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    right = [(1, 0.1), (2, 0.2), (3, 30.0), (4, 40.0)]
    assert [(e.step, e.tensor_proto.double_val[0]) for e in shown.Tensors("loss")] == right
    log = read_tensorboard(run.path / "tensorboard")
    assert log.in_order() == {step: {"loss": value, "reward": -value} for step, value in right}
    assert (log.met_twice, log.left_behind) == (4, 2)


def test_an_unknown_sink_is_refused_before_the_run(run: RunFolder):
    with pytest.raises(InvalidValueError, match="did you mean 'wandb'"):
        Sinks(run, ["wandbb"])


def test_a_sink_whose_package_is_missing_names_the_cure(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fp4rl.lab.sinks.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(NotFoundError, match=r"pip install 'fp4rl\[wandb\]'"):
        Sinks(run, ["wandb"])


def test_a_sink_that_fails_on_the_way_is_left_out_and_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    class Gone:
        def __init__(self, *_: object) -> None: ...

        def log(self, *_: object) -> None:
            raise ConnectionError("server went away")

        def close(self) -> None: ...

    monkeypatch.setitem(__import__("fp4rl.lab.sinks", fromlist=["_BY_NAME"])._BY_NAME, "mlflow", Gone)
    assert _log_all(run, "mlflow").failures == {"mlflow": "ConnectionError: server went away"}
    assert set(read_tensorboard(run.path / "tensorboard").steps) == set(LOGGED)


def test_names_that_mlflow_does_not_allow_never_collide():
    names = ["a@1", "a_1", "a 1", "a/1", "a#1", "val-core/x/mean@1"]
    assert len({allowed_name(name) for name in names}) == len(names)
    assert allowed_name("val-core/x/mean@1") == "val-core/x/mean_x40_1"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, under a newer SQLAlchemy
def test_mlflow_exports_what_was_logged(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="MLflow is not installed (extra 'mlflow')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert _log_all(run, "mlflow").failures == {}
    client = tracking.MlflowClient()
    experiment = client.get_experiment_by_name("trial").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.run_name == run.run_id
    exported = {
        (m.step, name): m.value for name in _names() for m in client.get_metric_history(found.info.run_id, name)
    }
    logged = {(step, allowed_name(name)): value for step, values in LOGGED.items() for name, value in values.items()}
    assert exported.keys() == logged.keys()
    finite = {key: value for key, value in logged.items() if math.isfinite(value)}
    assert {key: exported[key] for key in finite} == finite


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_goes_on_stays_one_run_in_mlflow(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="MLflow is not installed (extra 'mlflow')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for step in (1, 2):
        with Sinks(run, ["mlflow"], {"seed": 0}) as sinks:
            sinks.log(step, {"loss": float(step)})
        assert sinks.failures == {}
    client = tracking.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert found.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(found.info.run_id, "loss")] == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_how_a_run_ended_is_told_and_what_a_dead_one_left_open_is_closed(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tracking = pytest.importorskip("mlflow.tracking", reason="MLflow is not installed (extra 'mlflow')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RuntimeError), Sinks(run, ["mlflow"], {"seed": 0}):
        raise RuntimeError("it failed")
    client = tracking.MlflowClient()

    def status() -> str:
        (only,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
        return str(only.info.status)

    assert status() == "FAILED"
    with locked(run), beating(run.path, 3):
        Sinks(run, ["mlflow"], {"seed": 0})  # a process that dies closes nothing
        close_left_open(run.path.parent)
        assert status() == "RUNNING"
    close_left_open(run.path.parent)
    assert status() == "KILLED"


def _names() -> set[str]:
    return {allowed_name(name) for values in LOGGED.values() for name in values}


def test_wandb_exports_what_was_logged_and_prints_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed (extra 'wandb')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _log_all(run, "wandb").failures == {}
    assert capfd.readouterr() == ("", "")  # W&B's banner and summary are not for the terminal of a suite
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    exported = _read_wandb(file)
    logged = {(step, name): value for step, values in LOGGED.items() for name, value in values.items()}
    assert exported.keys() == logged.keys()
    assert all(_same(exported[key], value) for key, value in logged.items())


def _read_wandb(file: Path) -> dict[tuple[int, str], float]:
    from wandb.proto import wandb_internal_pb2

    until = time.monotonic() + 60  # its own process writes the end of the file after `finish` has returned
    while True:
        records = [wandb_internal_pb2.Record.FromString(data) for data in _leveldb_records(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > until:
            break
        time.sleep(0.1)
    found = {}
    for record in records:
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        found |= {(items["step"], key): float(value) for key, value in items.items() if key[0] != "_" and key != "step"}
    return found


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log after a 7-byte header: blocks of 32 KiB of (checksum, length, type, data)."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""
