"""From the words after `--precision` to profiles: names, and injections of the user's own."""

from collections.abc import Sequence
from typing import Any

from fp4rl.cli.injections import injections_by_name, injections_of, is_file
from fp4rl.spec.evaluation import MATMUL_NOISE


def asked_profiles(words: Sequence[str], injections: Sequence[str] = ()) -> dict[str, Any]:
    """Return the keys `profiles` and `injections` of an evaluation.

    A word of `--precision` is the name of a profile, or what `--injection` takes too: a YAML file with injections (an
    experiment, a run's `spec.yaml`, a file of `fp4rl scan --advise`, or injections alone), NAME=FILE, NAME={mapping} or
    keys. The profiles of `--injection` come last.
    """
    names: list[str] = []
    own: list[str] = []
    for word in words:
        if word.startswith(MATMUL_NOISE) or not ("=" in word or is_file(word)):
            names.append(word)
        else:
            own.append(word)
            names += injections_of(word, "--precision")
    given = injections_by_name(injections, "--injection", injections_by_name(own, "--precision"))
    return {"profiles": [*names, *(name for name in given if name not in names)], "injections": given}
