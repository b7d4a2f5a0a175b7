"""From the words after `--precision` to profiles: names, and injections of the user's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4rl.cli.terminal import say_once
from fp4rl.spec.errors import InvalidValueError, shown
from fp4rl.spec.evaluation import MATMUL_NOISE
from fp4rl.spec.former_names import renamings
from fp4rl.spec.load import read_yaml
from fp4rl.spec.plain_yaml import plain_values


def asked_profiles(words: Sequence[str]) -> dict[str, Any]:
    """Return the keys `profiles` and `injections` of an evaluation.

    A word is the name of a profile, a YAML file with an injection (an experiment, a run's `spec.yaml`, a file of
    `fp4rl scan --advise`, or an injection alone), or NAME=FILE or NAME={mapping}.
    """
    names, own = [], dict[str, Any]()
    for word in words:
        name, equals, what = word.partition("=")
        if word.startswith(MATMUL_NOISE) or not (equals or _is_file(word)):
            names.append(word)
            continue
        if not equals:  # the description of every run is called spec.yaml, so the name of its folder is taken
            file = Path(word)
            name, what = file.resolve().parent.name if file.stem == "spec" else file.stem, word
        if name in own:
            raise InvalidValueError(f"--precision {word}: {name!r} is named twice; write NAME=FILE")
        own[name] = _injection(word, what)
        names.append(name)
    return {"profiles": names, "injections": own}


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _injection(word: str, what: str) -> Any:
    if not _is_file(what):
        content = plain_values(what, shown(what), "try '{weight: mxfp4, input: mxfp8}'")
        if not isinstance(content, dict):
            raise InvalidValueError(f"--precision {word}: write NAME=FILE.yaml, or NAME={{mapping}} of an injection")
        return content
    content = read_yaml(what)
    say_once(renamings(content), f"{what}: ")
    if "arms" in content:
        cure = "name the spec.yaml of one of its runs"
        raise InvalidValueError(f"--precision {word}: a suite has many injections; {cure}")
    injection = content.get("injection", content)
    if injection is None:
        raise InvalidValueError(f"--precision {word}: {what} injects nothing, which is the profile full")
    return injection
