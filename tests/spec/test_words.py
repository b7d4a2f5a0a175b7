"""One is never several: the words of counts, and that messages use them.

The kind of fault: a number and a plural written side by side (`1 runs`, `1 of 35 sites are`).
"""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from fp4rl.spec.words import agreeing, counted

SOURCE = Path(__file__).parents[2] / "src" / "fp4rl"
# Rooms whose output a user reads on the screen. A count that cannot be one may stand as it is: say so here.
DOORS = sorted((SOURCE / "cli").glob("*.py"))
PLURAL = re.compile(
    r" (?:more |other |finished )?(?:runs|sites|places|layers|steps|texts|tokens|problems|seeds|comparisons|keys|draws|"
    r"questions|groups|mistakes|differences|degrees|arms)\b"
)
NEVER_ONE = {
    ("compare.py", "len(answers)"),  # said of more than one
    ("power.py", "len(spreads)"),  # of more than one
    ("scan_source.py", "self.source"),  # no count: `fp4rl run SPEC arms.NAME`
    ("show.py", "result.steps_asked or '?'"),  # `1/3`, of steps that were asked for
}


def test_a_count_and_its_word_agree():
    assert [counted(n, "run") for n in (0, 1, 2, 1200)] == ["0 runs", "1 run", "2 runs", "1,200 runs"]
    assert counted(1, "degree of freedom", "degrees of freedom") == "1 degree of freedom"
    assert counted(2, "degree of freedom", "degrees of freedom") == "2 degrees of freedom"
    assert [agreeing(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]


@pytest.mark.parametrize("file", DOORS, ids=lambda file: file.stem)
def test_no_verb_writes_a_plural_beside_a_number_that_may_be_one(file):
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for value, text in pairwise(parts):
            beside = isinstance(text, ast.Constant) and PLURAL.match(str(text.value))
            if isinstance(value, ast.FormattedValue) and value.format_spec is None and beside:
                found.append((file.name, ast.unparse(value.value)))
    assert set(found) - NEVER_ONE == set()
