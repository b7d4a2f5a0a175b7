"""The command line: a file for each verb, one line for each error; exit code 1: a check failed, 2: bad input."""

import ast
import gc
import inspect
import io
import re
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from fp4rl import __version__
from fp4rl.cli.terminal import forget_left_out, require_nothing_left_out
from fp4rl.engines.environment import launched, leave
from fp4rl.lab.files import is_full
from fp4rl.spec.errors import CheckFailed, UserError
from fp4rl.spec.frozen import at_home

# In the order of their listing. A verb's module has `command` (a function) or `app` (a Typer with sub-verbs), and may
# have `CONTEXT`, settings of the parser.
VERBS = (
    "quickstart",
    "deployments",
    "formats",
    "sites",
    "schedule",
    "scan",
    "keys",
    "new",
    "plan",
    "preflight",
    "data",
    "run",
    "search",
    "watch",
    "reward",
    "eval",
    "export",
    "verify",
    "health",
    "report",
    "runs",
    "show",
    "compare",
    "audit",
    "power",
    "ledger",
    "archive",
    "parity",
    "verl-config",
    "doctor",
)

_INTERRUPTED = 130

_HELP = (
    "A lab for RL post-training of language models that survive 4-bit hardware.\n\n"
    "Exit codes: 0 done, 1 a check failed, 2 bad input. fp4rl VERB --help shows an example of each verb."
)

_FIRST = """\
fp4rl: train policies that are as good in 4 bits as in BF16, and see it proven

  fp4rl quickstart          train four recipes for a tiny model, in 4 minutes
  fp4rl new my_suite        write a suite for the model and the data here
  fp4rl plan my_suite.yaml  see what it would run, how long, what is missing
  fp4rl run my_suite.yaml   run it, or go on; beside it: fp4rl watch my_suite
  fp4rl report my_suite     compare its arms, with intervals, and write a page
  fp4rl doctor              see what this machine can do, and test it

fp4rl --help lists every verb; fp4rl VERB --help shows one, with an example."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fp4rl {__version__}")
        raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options before the verb; `main` reads --debug itself, so that it also covers errors of parsing."""


def _app(verb: str | None) -> typer.Typer:
    """Return the command line with one verb loaded, or with the first line of every verb's docstring to list them."""
    app = typer.Typer(name="fp4rl", no_args_is_help=True, rich_markup_mode="rich", add_completion=False, help=_HELP)
    app.callback()(_options)
    if verb not in VERBS:
        for name in VERBS:
            app.command(name=name, help=_first_line(name))(lambda: None)
        return app
    module = import_module(f"fp4rl.cli.{verb.replace('-', '_')}")
    if hasattr(module, "app"):
        app.add_typer(module.app, name=verb)
    else:
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(module.command) or "")  # paragraphs wrap on the screen
        app.command(name=verb, help=text, context_settings=getattr(module, "CONTEXT", None))(module.command)
    return app


def _first_line(verb: str) -> str:
    """Return the first line of a verb's module, read without importing it, since listing verbs should be fast."""
    source = Path(__file__).with_name(f"{verb.replace('-', '_')}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    commands = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command"]
    docstring = (ast.get_docstring(commands[0]) if commands else None) or ast.get_docstring(tree) or ""
    line = docstring.split("\n\n")[0].replace("\n", " ").replace("`", "")
    return re.sub(r"^fp4rl \S+: (.)", lambda first: first[1].upper(), line)  # of a verb with sub-verbs: the module's


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [_at_home(a) for a in arguments if a != "--debug"]
    verb = next((a for a in arguments if not a.startswith("-")), None)
    forget_left_out()
    if not arguments:
        print(_FIRST)
        return 0
    try:
        code = int(_app(verb)(arguments, standalone_mode=False) or 0)
        if code == _INTERRUPTED:  # typer catches Ctrl-C and prints nothing
            raise KeyboardInterrupt
        require_nothing_left_out()
        return code
    except (Exception, KeyboardInterrupt) as error:
        answer = None if debug else _answer(error, verb)
        if answer is None:
            raise
        code, line = answer
        if line:  # printed as one line, whatever is in it: names and messages come from outside
            print("fp4rl:", " ".join(line.split("\n")), file=sys.stderr)
        return code


def _at_home(argument: str) -> str:
    """Expand `~` as a shell does, which it does not after `--runs=`."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and value.startswith("~"):
        return f"{option}{equals}{at_home(value)}"
    return at_home(argument)


def _answer(error: BaseException, verb: str | None) -> tuple[int, str] | None:
    """Return exit code and message for an error; None for a fault of fp4rl. OSErrors with a file are the user's."""
    match error:
        case TyperException():
            shown = str(error.format_message()).strip()
            path = getattr(getattr(error, "ctx", None), "command_path", "fp4rl")
            where = f"{path} --help shows {'its options' if path != 'fp4rl' else 'the verbs and their options'}"
            return (2, f"{shown.rstrip('.')}; {where}") if shown else (0, "")
        case CheckFailed():
            return 1, str(error)
        case KeyboardInterrupt() | typer.Abort():
            resumes = verb in ("run", "search", "quickstart")
            return _INTERRUPTED, f"stopped{'; the same command continues where it left off' if resumes else ''}"
        case BrokenPipeError():
            return 0, ""
        case FileNotFoundError() if error.filename is not None:
            return 2, f"{error.filename}: no such file or folder; name one that is there"
        case OSError() if error.filename is not None:
            return 2, f"{error.filename}: {error.strerror}; name another place, or make room there"
        case UserError():
            return 2, str(error)
        case ValueError() if "embedded null" in str(error):  # open's words; a YAML string may hold one
            return 2, "a path holds a NUL character; name another place"
        case _ if is_full(error):
            return 1, "a disk is full, or a quota used up; make room and run the same command again"
    return None


def entry() -> None:
    """Run the console script."""
    for stream in (sys.stdout, sys.stderr):  # a file name may have bytes that are not valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:2] in (["compare"], ["report"], ["runs"], ["show"]):
        gc.disable()  # they read many records, which hold no cycles to search for, and end
    code = main()
    if code == _INTERRUPTED:  # a second Ctrl-C during the exit would print tracebacks
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if launched():
        leave(code)
    sys.exit(code)
