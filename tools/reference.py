"""Write the pages that the code knows: every verb with its options, every key of a description, every known trap.

`make docs` runs this.

`python tools/reference.py [--check]`: with --check nothing is written, and pages that are not up to date leave with 1.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import typer

from fp4rl.cli.main import VERBS, _app
from fp4rl.lab.preflight.traps import WHEN, Trap, traps
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.keys import Key, described_keys
from fp4rl.spec.scan import ScanRequest
from fp4rl.spec.space import Space

PAGES = Path(__file__).parents[1] / "docs"


def cell(text: object) -> str:
    """Text that fits into a cell of a table: on one line, bars escaped."""
    return " ".join(str(text).split()).replace("|", "\\|")


def verbs() -> Iterator[str]:
    """The page of the command line, line by line."""
    yield "# Verbs\n\nGenerated from the code by `make docs`. Exit codes: 0 fine, 1 a check failed, 2 bad input.\n"
    for verb in VERBS:
        command = typer.main.get_command(_app(verb))
        inner = command.commands[verb]  # type: ignore[attr-defined]
        if isinstance(inner, click.Group) or hasattr(inner, "commands"):
            yield f"## fp4rl {verb}\n\n{_help(inner)}\n"
            for name, sub in inner.commands.items():
                yield from _verb(f"{verb} {name}", sub, "###")
        else:
            yield from _verb(verb, inner, "##")


def _verb(name: str, command: Any, level: str) -> Iterator[str]:
    yield f"{level} fp4rl {name}\n\n{_help(command)}\n"
    rows = [_parameter(p) for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    if rows:
        yield from _table(("argument or option", "meaning", "default"), rows)


def _help(command: Any) -> str:
    lines = (command.help or "").partition("\f")[0].strip().splitlines()
    return "\n".join(line.strip() for line in lines)


def _parameter(parameter: Any) -> tuple[str, str, str]:
    is_option = parameter.param_type_name == "option"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    shown = names if is_option else f"`{(parameter.metavar or parameter.name).upper().strip('[]')}`"
    default = parameter.default
    no_default = (
        default is None or default is False or callable(default) or default == () or "Sentinel" in repr(type(default))
    )
    return shown, getattr(parameter, "help", None) or "", "" if no_default else f"`{default}`"


def keys() -> Iterator[str]:
    """The page of the keys, a section for each first word."""
    yield "# Keys\n\nGenerated from the code by `make docs`; `fp4rl keys PREFIX` prints the same.\n"
    yield "## Of an experiment, and of the `base` of a suite\n"
    yield from _keys(described_keys(Experiment))
    yield "\n## Of a suite\n"
    yield from _keys(described_keys(Suite))
    yield "\n## Of a space that `fp4rl search` reads\n"
    yield from _keys(described_keys(Space))
    yield "\n## Of a scan\n"
    yield from _keys(described_keys(ScanRequest))


def _keys(found: Iterable[Key]) -> Iterator[str]:
    rows = [(f"`{key.path}`", key.kind, _default(key), key.meaning or "") for key in found]
    yield from _table(("key", "type", "default", "meaning"), rows)


def _default(key: Key) -> str:
    if key.default is ...:
        return "required"
    return "none" if key.default is None else f"`{key.default}`"


def known_traps() -> Iterator[str]:
    """The page of the traps, a row for each."""
    yield "# Traps\n"
    yield "Generated from the code by `make docs`. Each of these happened: in this code, in the documents behind it,"
    yield "or in public reports. `fp4rl preflight SPEC` looks for those that show before a run; the others are watched"
    yield "while it runs, or refuse a comparison. Each row links tests that plant the very defect.\n"
    head = ("", "trap", "how it happened", "where it is caught", "how it shows", "tests")
    yield from _table(head, [_trap(own) for own in traps().values()])


def _trap(own: Trap) -> tuple[str, ...]:
    caught = (f"{WHEN[when]}: {', '.join(f'`{name}`' for name in names)}" for when, names in own.caught.items())
    tests = (
        (test.partition("::")[0], test.partition("::")[2].removeprefix("test_").replace("_", " ")) for test in own.tests
    )
    links = ", ".join(f"[{words}](../../tests/{file})" for file, words in tests)
    return own.number, own.trap, own.happened, "; ".join(caught), own.shows, links


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"
    yield ""


def main() -> int:
    """Write the pages, or with --check say which of them is old."""
    old = []
    pages = {"reference/verbs.md": verbs(), "reference/keys.md": keys(), "concepts/traps.md": known_traps()}
    for name, lines in pages.items():
        text, page = "\n".join(lines).rstrip() + "\n", PAGES / name
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        old.append(name)
        if "--check" not in sys.argv:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
    if old and "--check" in sys.argv:
        print(f"docs: {', '.join(old)} not up to date; run make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
