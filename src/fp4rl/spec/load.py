"""Load validated descriptions from YAML and `key=value` words, with errors that name the cure."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fp4rl.spec.digest import canonical
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, shown
from fp4rl.spec.experiment import Comparison, Experiment, Suite
from fp4rl.spec.former_names import in_present_words, renamings
from fp4rl.spec.frozen import at_home
from fp4rl.spec.keys import keys_at, truth_as_number, validation_message, wrong_part
from fp4rl.spec.linked import linked
from fp4rl.spec.model import embedded
from fp4rl.spec.own_code import beside
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.points import FORMAT_POINTS

S = TypeVar("S", bound=BaseModel)


def load_spec(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), content: Mapping[str, Any] | None = None
) -> Experiment | Suite:
    """Read a YAML file (a suite if it has `arms`, else one experiment), overridden by `key.path=value` or `+file.yaml`.

    In a suite, `key.path=value` changes the base unless the key is the suite's own (`seeds=[0]`). `key.path=+file.yaml`
    lays the file's content there (`arms.w4a16=+advice.yaml`). Raises NotFoundError for a missing file and
    InvalidValueError for anything in it that is not allowed; both name file, key and cure. `content` is what the file
    would hold, where a table holds it; `path` then only names it.
    """
    folder = Path(at_home(path)).parent if content is None else Path()
    first: dict[str, Any] = beside(read_spec(path) if content is None else dict(content), folder)
    is_suite = "arms" in first or "suite" in first
    stages = [first]
    for word in overrides:
        stages.append(beside(_override(stages[-1], word, is_suite), folder))
    try:
        return _described(stages[-1], is_suite, str(path))
    except InvalidValueError as error:
        messages = (_message(partial(_described, stage, is_suite, str(path))) for stage in stages)
        same = next(i for i, message in enumerate(messages) if message == str(error))
        if same == 0:
            raise
        return _described(stages[-1], is_suite, f"{path} with {overrides[same - 1]!r}")


def _described(content: dict[str, Any], is_suite: bool, source: str) -> Experiment | Suite:
    if not is_suite:
        return parse(Experiment, content, source)
    suite = parse(Suite, content, source)
    arms = dict(arm_contents(suite, source))
    check_questions(suite.comparisons, arms, source)
    for number, criterion in enumerate(suite.criteria):
        for key, side in (("of", criterion.of), ("against", criterion.against)):
            if side is not None:
                _check_side(f"{source}: criteria.{number}.{key}", side, arms, bare=criterion.metric != "accuracy")
    return suite


def _message(make: Callable[[], object]) -> str | None:
    try:
        make()
    except InvalidValueError as error:
        return str(error)
    return None


def check_questions(questions: tuple[Comparison, ...], arms: Mapping[str, Experiment], source: str) -> None:
    """Raise InvalidValueError for a side whose arm or profile is not in the suite, and for a factor that is no key."""
    for number, question in enumerate(questions):
        path = f"{source}: comparisons.{number}"
        for key, side in (("treatment", question.treatment), ("control", question.control)):
            _check_side(f"{path}.{key}", side, arms)
        if question.treatment == question.control:
            raise InvalidValueError(f"{path}: {question.treatment} is compared with itself; name two sides that differ")
        check_factors(question.factors, f"{path}.factors")


def check_factors(factors: Iterable[str], path: str) -> None:
    """Raise InvalidValueError for a factor that is neither a key of an experiment nor `precision`."""
    for factor in factors:
        parts = factor.split(".")
        wrong = None if factor == "precision" else wrong_part(Experiment, parts)
        if wrong is not None:
            known = nearest(parts[wrong], keys_at(Experiment, parts[:wrong]))
            raise InvalidValueError(f"{path}: {factor!r} is no key{known}")


def _check_side(path: str, side: str, arms: Mapping[str, Experiment], *, bare: bool = False) -> None:
    """Check a side; with `bare` it may be an arm alone, whose steps log the number."""
    arm, _, profile = side.partition("@")
    if arm not in arms:
        raise InvalidValueError(f"{path}: no arm is called {arm!r}{nearest(arm, arms)}")
    if bare and not profile:
        return
    evaluation = arms[arm].evaluation
    profiles = (*evaluation.profiles, *evaluation.sweep)
    if not profile:
        raise InvalidValueError(f"{path}: a side is written arm@profile; {arm} is judged as {', '.join(profiles)}")
    if profile not in profiles:
        raise InvalidValueError(
            f"{path}: {arm} is not judged as {profile!r}{nearest(profile, profiles)}; its evaluation.profiles say which"
        )


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping from a file; InvalidValueError names the line of a mistake in it."""
    file = Path(at_home(path))
    try:
        content = plain_values(file.read_text(encoding="utf-8-sig"), str(file))
    except UnicodeDecodeError:
        raise InvalidValueError(f"{file}: not a text file in UTF-8") from None
    except OSError as error:
        known = {FileNotFoundError: "no such file", IsADirectoryError: "is a folder"}
        what = known.get(type(error), f"cannot be read: {error.strerror}")
        raise NotFoundError(f"{file}: {what}; name a YAML file") from None
    if not isinstance(content, dict):
        kind = {type(None): "nothing: the file is empty", list: "a list"}.get(type(content), "a single value")
        raise InvalidValueError(f"{file}: expected keys and values, found {kind}")
    return content


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a description from a YAML file as `read_yaml` does, with the present names of its keys."""
    return dict(in_present_words(read_yaml(path)))


def former_words(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> list[str]:
    """Return a sentence for each former name in a file, if any, and in overrides, once for all arms."""
    given = [*([read_yaml(path)] if path is not None else []), *map(_given, overrides)]
    return list(dict.fromkeys(renamings(given)))


def parse(kind: type[S], content: Mapping[str, Any], source: str) -> S:
    """Validate `content` as a `kind`; the first error becomes one line that names `source` (a file or an option, empty
    where the key says it all), the key and the cure."""
    try:
        value = kind.model_validate(content)
    except ValidationError as error:
        message: str | None = validation_message(kind, error)
    else:
        message = truth_as_number(content, value.model_dump(mode="json"))
        if message is None:
            return value
    raise InvalidValueError(f"{source}: {message}" if source else message)


def arm_contents(suite: Suite, source: str | None = None) -> Iterator[tuple[str, Experiment]]:
    """Yield every arm crossed with every axis value as (name, experiment with seed 0), in the order of the file.

    `source` names the file in messages; by default the suite's own name does. Raises InvalidValueError for two arms
    that describe the same experiment: comparing them would compare an experiment with itself. Also what `linked` does.
    """
    source = source or f"suite {suite.suite}"
    known: dict[str, str] = {}
    experiments: dict[str, Experiment] = {}
    for name, content in _crossed(suite):
        check_name(name, f"{source}: arm")
        experiment = _of_arm(name, content, suite.base, source)
        twin = known.get(canonical(experiment))
        if twin is not None:
            raise InvalidValueError(f"{source}: {_twins(twin, name)}")
        if name in known.values():
            raise InvalidValueError(
                f"{source}: two arms are called {name!r}; rename the one or drop the value of its axis"
            )
        known[canonical(experiment)] = name
        experiments[name] = experiment
    yield from linked(experiments, list(suite.arms), source).items()


def arm_content(suite: Suite, arm: str) -> dict[str, Any]:
    """Return the content of one arm (or arm and axis value) laid over the suite's base, as it stands in the file."""
    return dict(_crossed(suite))[arm]


def _crossed(suite: Suite) -> list[tuple[str, dict[str, Any]]]:
    crossed: list[tuple[str, dict[str, Any]]] = [(name, merge(suite.base, a)) for name, a in suite.arms.items()]
    for key, values in suite.axes.items():
        last = key.rsplit(".", 1)[-1]
        crossed = [(f"{name}+{last}={value}", merge(c, {key: value})) for name, c in crossed for value in values]
    return crossed


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_LONGEST = 150  # a run's folder is called by its arm, seed and digest, and a file system takes 255 bytes


def check_name(name: str, what: str) -> None:
    """Raise InvalidValueError for a name that is no folder's; `what` is named by it."""
    if not _NAME.fullmatch(name):
        cure = "; of an axis with other values make arms, whose names are yours" if "=" in name else ""
        raise InvalidValueError(f"{what} {name!r}: a name is letters, digits and ._+=-, since it names folders{cure}")
    if len(name) > _LONGEST:
        raise InvalidValueError(
            f"{what} {shown(name)}: a name of {len(name)} letters is too long for a folder; {_LONGEST} fit"
        )


def _twins(first: str, other: str) -> str:
    if first == other:
        return f"arm {first}: an axis holds the same value twice; a run would count twice"
    return (
        f"arms {first} and {other} describe the same experiment; an override changes the "
        "base of all arms, `arms.NAME.key=value` and `arms.NAME=+file.yaml` change one"
    )


def _of_arm(name: str, content: dict[str, Any], base: dict[str, Any], source: str) -> Experiment:
    try:
        return parse(Experiment, content, "")
    except InvalidValueError as error:
        from_base = _message(partial(parse, Experiment, base, "")) == str(error)  # then all arms have it
        raise InvalidValueError(f"{source}: {'base' if from_base else f'arm {name}'}: {error}") from None


# Keys that may hold one word or number in place of a mapping, and the key of the mapping that it stands for.
_SHORT = {
    "injection": "mode",
    "model": "path",
    "schedule": "kind",
    "edge": "value",
    "middle": "value",
    "rollout": "engine",
}
_SHORT |= dict.fromkeys(FORMAT_POINTS, "name")


def _written_out(key: str, present: Any) -> Mapping[str, Any]:
    """Return the value of a key as a mapping: nothing for what a mapping replaces, such as `none` or a list."""
    if isinstance(present, Mapping):
        return present
    if key not in _SHORT or present in (None, "none") or not isinstance(present, str | int | float):
        return {}
    return (embedded(present) if key == "model" and isinstance(present, str) else None) or {_SHORT[key]: present}


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `change` laid over it: mappings merge key by key, anything else replaces; dotted keys are
    paths, except patterns of names, which have a star. A mapping laid over a short form (`injection: w4a4`) changes
    what that stands for."""
    merged = deepcopy(dict(base))
    for key, value in change.items():
        # A layer number is a key too, and `*.layers.0.*` is one key.
        head, _, rest = str(key).partition(".") if "*" not in str(key) else (key, "", "")
        head = next((known for known in merged if str(known) == head), head)  # 0 and "0" are the same layer
        below = {rest: value} if rest else value
        present = merged.get(head)
        if isinstance(below, Mapping):
            merged[head] = merge(_written_out(str(head), present), below)
        else:
            merged[head] = deepcopy(below)
    return merged


def change_of(word: str) -> dict[str, Any]:
    """Return the keys that an override, `key.path=value`, `key.path=+file.yaml` or `+file.yaml`, changes."""
    return dict(in_present_words(_given(word)))


def _given(word: str) -> dict[str, Any]:
    if word.startswith("+"):
        return read_yaml(word[1:])
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise InvalidValueError(f"{shown(word)}: an override is written key.path=value, or +file.yaml for a fragment")
    if text.startswith("*"):  # a pattern of names; in YAML it would be an alias, which one value alone cannot have
        return {key: text}
    return {key: read_yaml(text[1:]) if text.startswith("+") else plain_values(text, shown(word))}


def _override(content: dict[str, Any], word: str, is_suite: bool) -> dict[str, Any]:
    change = change_of(word)
    if not is_suite:
        return merge(content, change)
    own = {k: v for k, v in change.items() if k.partition(".")[0] in Suite.model_fields}
    to_base = {k: v for k, v in change.items() if k not in own}
    return merge(content, {**own, **({"base": to_base} if to_base else {})})
