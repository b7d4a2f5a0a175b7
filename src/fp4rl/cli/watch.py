"""`fp4rl watch`: a live picture of runs that others train, from their folders alone."""

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json
from fp4rl.lab.files import json_ready
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

if TYPE_CHECKING:
    from fp4rl.lab.watching import Watcher

_EVERY_S = 1.0
_LINES = 24  # of a picture that no terminal limits


def command(
    watched: Annotated[
        str, typer.Argument(metavar="RUN_OR_SUITE", help="Folder of a suite or run, or suite, suite/run below --runs.")
    ],
    runs: RunsRoot = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end, as on a pipe.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Serve the suite's report to this machine's browser.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --html; 0 takes a free one.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Watch runs live: status, time left, curves, health and warnings; also runs that end, die or are not begun yet.

    Nothing is written into their folders. Ctrl-C ends the watching with exit code 0. Example: `fp4rl watch quickstart`
    """
    from fp4rl.lab.watching import Watcher  # the rest is the health monitor's, which `--help` needs not

    folder, run = located(watched, runs)
    if html:
        if once or as_json:
            raise InvalidValueError("--html: serves pages, so --once and --json mean nothing beside it; leave one out")
        from fp4rl.cli.watch_page import serve

        serve(folder, port)
        return
    watch, screen = Watcher(folder, run), console()
    if not (once or as_json) and screen.is_terminal:
        _follow(watch, screen)
        return
    view = watch.look()
    if view.missing:
        others = [file.parent.name for file in runs.glob("*/suite.yaml")] if not folder.is_dir() else []
        raise NotFoundError(f"{view.missing}{nearest(folder.name, others) if others else ''}")
    if as_json:
        print_json(json_ready(view.as_dict()))
    else:
        _print(watch, screen)


def located(watched: str, runs: Path) -> tuple[Path, str]:
    """Return the suite's folder, there or not yet, and the beginning of the run's id; empty for all of its runs."""
    path = Path(watched)
    if not path.is_dir() and not path.is_absolute():
        path = runs / path
    own = (path / "spec.yaml", path / "metrics.jsonl", path / "heartbeat.json")
    beginning = not path.is_dir() and path.parent != runs and (path.parent / "suite.yaml").is_file()
    if beginning or any(file.is_file() for file in own):
        path = path.resolve()
        return path.parent, path.name
    suites = [] if path.exists() or len(Path(watched).parts) > 1 else sorted(runs.glob("*/suite.yaml"))
    matching = [file.parent for file in suites if any(run.name.startswith(watched) for run in file.parent.iterdir())]
    if len(matching) == 1:
        return matching[0], watched
    return (path.parent, path.name) if len(Path(watched).parts) == 2 and path.parent.parent == runs else (path, "")


def _follow(watch: "Watcher", screen: Console) -> None:
    """Show the picture until Ctrl-C, and leave the last one on the screen."""
    # A flag: a KeyboardInterrupt that comes while Python runs a finalizer is reported there and lost.
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        with Live(console=screen, screen=True, auto_refresh=False) as live:
            while not interrupts:
                live.update(_picture(watch, screen), refresh=True)
                shown = time.monotonic()
                while not interrupts and time.monotonic() - shown < _EVERY_S:
                    time.sleep(_EVERY_S / 20)
    finally:
        signal.signal(signal.SIGINT, before)
    _print(watch, screen)


def _print(watch: "Watcher", screen: Console) -> None:
    screen.print(_picture(watch, screen))


def _picture(watch: "Watcher", screen: Console) -> Text:
    from fp4rl.cli.watch_frame import frame

    height = screen.height if screen.is_terminal else _LINES
    return Text("\n").join(frame(watch.look(), screen.width, height))
