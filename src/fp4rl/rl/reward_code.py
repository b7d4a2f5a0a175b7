"""Reward functions of the user's own: found, loaded and called, one answer at a time or a whole batch, also async."""

import asyncio
import hashlib
import inspect
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.own_code import in_a_file
from fp4rl.spec.task import Problem

Reward = Callable[..., Any]
"""`reward(prompt=..., completion=..., answer=...)` -> a number; None or NaN for an answer that cannot be judged.

With a parameter `completions` it is called once a batch, as `reward(prompts=..., completions=..., answers=...)`, and
returns a list. Either may be `async`: the calls of a batch then wait together.
"""


def function_at(name: str, key: str = "training.reward") -> Reward:
    """Return the function at `file.py:function` or `package.module.function`.

    Raises NotFoundError for what cannot be found or imported, InvalidValueError for what is not a function and for code
    that fails while it is loaded.
    """
    if name.endswith(".py"):
        raise InvalidValueError(f"{key} {name!r} names a file, but no function in it; write {name}:FUNCTION")
    home, attribute = in_a_file(name) or name.rpartition(".")[::2]
    try:
        module = _from_file(Path(home).resolve()) if in_a_file(name) else import_module(home)
    except ImportError as error:
        cure = "" if in_a_file(name) else "; is its folder on PYTHONPATH?"
        raise NotFoundError(f"{key} {name!r}: {error}{cure}") from None
    except (Exception, SystemExit) as error:
        said = str(error).splitlines()[0] if str(error) else "no message"
        raise InvalidValueError(f"{key} {name!r}: loading it fails ({type(error).__name__}: {said})") from error
    function = getattr(module, attribute, None)
    if function is None:
        raise NotFoundError(f"{key} {name!r}: {home} has no {attribute!r}")
    if not callable(function):
        raise InvalidValueError(f"{key} {name!r} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ImportError(f"{file} does not exist; name a file beside the suite, or in the current folder")
    return _loaded(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _loaded(file: Path, _written: int) -> ModuleType:
    """Load a file as a module of a name of its own; once a process, unless the file changes."""
    spec = spec_from_file_location(f"fp4rl_own_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(name: str) -> list[Path]:
    """Return the file of a reward's code; of one in a package every source file of that package, since the module may
    import them. Empty for a reward that ships with fp4rl."""
    if own := in_a_file(name):
        return [Path(own[0])] if Path(own[0]).is_file() else []
    module = name.rpartition(".")[0]
    try:
        spec = find_spec(module) if module else None
    except (ImportError, ValueError):  # the run reports the former; a module made in memory has no source
        return []
    if spec is None or not spec.origin:
        return []
    file = Path(spec.origin)
    return sorted(file.parent.rglob("*.py")) if spec.parent else [file]


def called(function: Reward, problems: Sequence[Problem], completions: Sequence[str]) -> list[Any]:
    """Return what a function gives each completion, or the exception that it raised for it."""
    if takes_batches(function):
        return _of_batch(function, problems, completions)
    words = [
        {"prompt": problem.prompt, "completion": text, "answer": problem.answer}
        for problem, text in zip(problems, completions, strict=True)
    ]
    if _is_async(function):
        return asyncio.run(_together([function(**each) for each in words]))
    return [_attempted(function, each) for each in words]


def takes_batches(function: Reward) -> bool:
    """Return whether a function takes all answers of a batch at once: it has a parameter `completions`."""
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return False


def _of_batch(function: Reward, problems: Sequence[Problem], completions: Sequence[str]) -> list[Any]:
    prompts, answers = [problem.prompt for problem in problems], [problem.answer for problem in problems]
    given = function(prompts=prompts, completions=list(completions), answers=answers)
    values = list(asyncio.run(given) if inspect.iscoroutine(given) else given)
    if len(values) != len(completions):
        raise ValueError(f"it returned {len(values)} rewards for {len(completions)} answers")
    return values


def _is_async(function: Reward) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004


async def _together(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def _attempted(function: Reward, words: dict[str, str]) -> Any:
    try:
        return function(**words)
    except (Exception, SystemExit) as error:
        return error


def require_callable(function: Reward, name: str) -> None:
    """Raise InvalidValueError for a function that cannot be called as a reward is, with what it is called with."""
    plural = "s" if takes_batches(function) else ""
    words = [f"{word}{plural}" for word in ("prompt", "completion", "answer")]
    try:
        signature = inspect.signature(function)
        signature.bind(**dict.fromkeys(words))
    except TypeError:
        wanted = "(prompts, completions, answers)" if plural else "(prompt, completion, answer)"
        raise InvalidValueError(
            f"training.reward {name!r} takes {signature}; it is called by name: write {wanted}, or **_ for those that "
            "it does not use" + ("" if plural else "; with completions it is called once a batch")
        ) from None
    except ValueError:  # written in C
        return


def failure(error: BaseException, function: Reward) -> str:
    """Return in words what a reward function raised, with file and line: the last of its own file."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        said = f"it called exit ({error.code}), and must return a number"
    frames = extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else said
