"""What docs/concepts/injection.md shows and counts is what the code does."""

import re
from pathlib import Path

import pytest
import yaml

from fp4rl.inject.resolve import resolve
from fp4rl.models.load import embedded_skeleton
from fp4rl.spec.hardware import CAPABILITIES
from fp4rl.spec.injection import MODES, PHASES, Injection
from fp4rl.spec.model import Embedded
from fp4rl.spec.points import FORMAT_POINTS

PAGE = (Path(__file__).parents[2] / "docs" / "concepts" / "injection.md").read_text(encoding="utf-8")
DESCRIBED, BY_PART, ERRORS, CHANGING = (
    yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
)


@pytest.mark.parametrize("more", [{}, ERRORS], ids=["formats", "and errors"])
def test_what_it_describes_can_be_injected(more):
    table = resolve(embedded_skeleton(Embedded()), Injection.model_validate(DESCRIBED["injection"] | more))
    assert len(table.plans) == 16
    assert any(plan.errors for plan in table.plans) == bool(more)


def test_what_it_says_of_parts_is_taken():
    rules = Injection.model_validate(BY_PART["injection"]).by_pattern
    assert {rule.pattern for rule in rules} >= {"experts", "attention", "router"}


def test_the_precision_that_changes_has_the_stages_that_it_says():
    schedule = Injection.model_validate(CHANGING["injection"]).schedule.input
    assert [schedule.stage(step) for step in (0, 19, 20, 29, 30, None)] == [
        *["before"] * 2,
        *["blend"] * 2,
        *["after"] * 2,
    ]
    assert [schedule.share(step) for step in (20, 29)] == pytest.approx([1 / 11, 10 / 11])


def test_it_names_every_mode_point_phase_and_kind_of_error():
    kinds = {kind for kind, _, _ in CAPABILITIES}
    assert {word for word in (*MODES, *FORMAT_POINTS, *PHASES, *kinds) if f"`{word}`" not in PAGE} <= {"none"}


def test_it_counts_the_table_of_capabilities():
    acting = sum(reason is None for reason in CAPABILITIES.values())
    assert f"which of the {len(CAPABILITIES)} triples" in PAGE
    assert f"act ({acting})" in PAGE
