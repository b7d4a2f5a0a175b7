"""TensorBoard event files, written without torch or TensorFlow, in float64."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fp4rl.lab.folders import RunFolder


class TensorBoardSink:
    """Event files in the run's folder `tensorboard/`.

    Scalars are written as tensors of float64 with the scalar plugin's metadata: the usual `simple_value` is a float32,
    and would export another number than was logged.

    The writer and its thread start with the first step. accelerate empties and refills the whole environment while the
    trainer is made, and a thread that reads the environment meanwhile takes the process with it.

    A run that goes back to an earlier step (a rollback, a resume) says so by a start of session, by which TensorBoard
    drops what was logged from that step on.
    """

    def __init__(self, run: RunFolder) -> None:
        self._folder = run.path / "tensorboard"
        self._writer: Any = None
        self._latest: tuple[int, set[str]] = (-1, set())  # the last step, and the names that it has

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.scalar.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        latest, names = self._latest
        back = step < latest or (step == latest and not names.isdisjoint(values))
        if self._writer is None or back:
            self._writer = self._writer or EventFileWriter(str(self._folder))
            self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._latest = (step, set(values) | (names if step == latest and not back else set()))
        shown_as_scalar = create_summary_metadata(display_name=None, description="")
        exported = [
            Summary.Value(tag=name, tensor=make_tensor_proto(np.float64(value)), metadata=shown_as_scalar)
            for name, value in values.items()
        ]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=exported)))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
