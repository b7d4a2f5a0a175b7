"""TensorBoard event files: every scalar of one run, however it was written."""

from pathlib import Path
from typing import Any

from fp4rl.lab.foreign.joined import Joined
from fp4rl.spec.mistakes import BadValue, NotThere

EVENTS = "*tfevents*"


def read_tensorboard(path: Path) -> Joined:
    """The scalars of an event file, or of all event files of one folder.

    Steps that a resumed run wrote again are kept as logged: the first value of a key stays, the others are listed.
    Raises `BadValue` for a folder that holds several runs, `NotThere` where tensorboard is not installed.
    """
    joined = Joined()
    for file in _event_files(path):
        events = _load(file)
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                joined.add(event.step, name, float(event.value))
        for name in events.Tags()["tensors"]:
            _take_tensors(joined, name, events.Tensors(name))
    return joined


def _take_tensors(joined: Joined, name: str, events: list[Any]) -> None:
    """TensorFlow 2 and our own sink write a scalar as a tensor without axes."""
    from tensorboard.util import tensor_util

    for event in events:
        value = tensor_util.make_ndarray(event.tensor_proto)
        if value.ndim == 0 and value.dtype.kind in "fiub":
            joined.add(event.step, name, float(value))
        else:
            joined.skipped.append(f"step {event.step}: {name} has the shape {value.shape} and type {value.dtype}")


def _event_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.rglob(EVENTS))
    folders = sorted({file.parent for file in files})
    if not files:
        raise NotThere(f"{path}: no event file ({EVENTS}) in this folder")
    if len(folders) > 1:
        raise BadValue(f"{path} holds {len(folders)} runs; name one of {', '.join(folder.name for folder in folders)}")
    return files


def _load(file: Path) -> Any:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError:
        raise NotThere("reading event files needs tensorboard: pip install 'fp4rl[train]'") from None
    # 0 keeps every value; the default keeps a sample of 10,000. Purging would drop what a resumed run wrote again.
    every = {"scalars": 0, "tensors": 0, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
    return EventAccumulator(str(file), size_guidance=every, purge_orphaned_data=False).Reload()
