"""All sinks of one run behind one `log`: TensorBoard always, others when asked."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.sinks.mlflow import MlflowSink
from fp4rl.lab.sinks.tensorboard import TensorBoardSink
from fp4rl.lab.sinks.wandb import WandbSink
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest


class Sink(Protocol):
    """Takes the numbers of a step. What it exports equals what was logged, to the last bit of a float64."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


_ASKED: dict[str, Callable[[RunFolder, Mapping[str, Any]], Sink]] = {"wandb": WandbSink, "mlflow": MlflowSink}
_EXTRAS = {"tensorboard": "train"}


def require_sinks(asked: Sequence[str]) -> None:
    """Raise `InvalidValueError` for a word that names no sink, `NotFoundError` where its package is missing; loads none
    of them."""
    for name in asked:
        if name not in _ASKED and name != "tensorboard":
            raise InvalidValueError(f"no sink {name!r}" + nearest(name, ("tensorboard", *_ASKED)))
        if find_spec(name) is None:
            raise NotFoundError(f"the sink {name!r} needs its package: pip install 'fp4rl[{_EXTRAS.get(name, name)}]'")


class Sinks:
    """A context manager over all sinks of a run.

    `metrics.jsonl` is the record; a sink that was asked for and fails on the way (a server that went away) is left out
    from then on and named in `failures`, because curves are no reason to lose hours of training.
    """

    def __init__(self, run: RunFolder, asked: Sequence[str] = (), spec: Mapping[str, Any] | None = None) -> None:
        """`asked`: "wandb", "mlflow" or both. Raises `InvalidValueError` for another word, `NotFoundError` for a
        missing package."""
        require_sinks(("tensorboard", *asked))
        self.failures: dict[str, str] = {}
        self._open: dict[str, Sink] = {"tensorboard": TensorBoardSink(run)}
        for name in dict.fromkeys(asked):
            if name in _ASKED:
                self._open[name] = _ASKED[name](run, spec or {})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, sink in list(self._open.items()):
            self._attempt(name, lambda sink=sink: sink.log(step, values))  # type: ignore[misc]

    def close(self) -> None:
        for name, sink in list(self._open.items()):
            self._attempt(name, sink.close)
        self._open.clear()

    def _attempt(self, name: str, deed: Callable[[], None]) -> None:
        try:
            deed()
        except Exception as error:  # whatever a client library raises
            if name == "tensorboard":
                raise
            self.failures[name] = f"{type(error).__name__}: {error}"
            del self._open[name]

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
