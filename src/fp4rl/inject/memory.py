"""What an attachment has seen and where its chance stands, so that an interrupted run goes on as if it never was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from fp4rl.inject.attach import Attachment
from fp4rl.inject.evidence import Meter


def state_dict(attachment: Attachment) -> dict[str, Any]:
    """Site -> its step (random kinds draw by it) and its meters, JSON-able."""
    found = {}
    for name, state in attachment.states.items():
        state.book()
        meters = [[*key, *(getattr(meter, f.name) for f in fields(Meter))] for key, meter in state.meters.items()]
        found[name] = {"step": state.chance.step, "meters": meters}
    return found


def load_state_dict(attachment: Attachment, memory: Mapping[str, Any]) -> None:
    """Put back what `remembered` gave, for the sites that it names."""
    for name, state in attachment.states.items():
        if name in memory:
            state.uncount()
            state.chance.step = memory[name]["step"]
            state.meters = {
                (phase, point): Meter(**dict(zip((f.name for f in fields(Meter)), values, strict=True)))
                for phase, point, *values in memory[name]["meters"]
            }


@contextmanager
def drawing_alike(one: Attachment, other: Attachment) -> Iterator[None]:
    """Both draw the same for the same tensors: `other` stands at the step of `one`, and jitter comes from the seed.

    Sites are matched by their names; a switch of phase inside would move the step of one of them alone.
    """
    for name, state in other.states.items():
        state.chance.step = one.states[name].chance.step
    chances = [state.chance for attachment in (one, other) for state in attachment.states.values()]
    for chance in chances:
        chance.repeatable = True
    try:
        yield
    finally:
        for chance in chances:
            chance.repeatable = False
