"""Which sites of a model are meant: whole patterns over dotted names, and layers by number."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.frozen import Spec, WordOrList, later_key

# What no serving engine runs in 4 bits. To round one of them all the same, name its role in `opt_in`, which takes that
# role's patterns out of this default; or write all that is left in `leave_only`.
LEFT_BY_DEFAULT = ("*lm_head*", "*embed*", "*norm*", "*router*", "*.gate", "*shared_expert_gate", "*lora_*")

Patterns = Annotated[tuple[str, ...], WordOrList]
_PIECE = re.compile(r"\[(?:[!^].|[^!^])[^\]]*\]|.", re.DOTALL)  # a class of characters, or one character

OptIn = Literal["router", "adapter", "lm_head"]
_LEAVES: Mapping[str, tuple[str, ...]] = {  # the patterns of the default that keep each role out
    "router": ("*router*", "*.gate", "*shared_expert_gate"),
    "adapter": ("*lora_*",),
    "lm_head": ("*lm_head*",),
}
# Layers that multiply are no norms or embeddings, even if their names hold the word (`norm_attn_norm.attn`).
_NO_LAYERS, _LAYERS = ("*embed*", "*norm*"), ("attention", "mlp", "experts", "shared_experts")


class Targets(Spec):
    """Sites taken by a pattern of `take`, by no pattern of `leave`, in one of `layers` (negative: from the end).

    Patterns are shell patterns over the whole dotted name; `*` also crosses dots, and a number stands for itself:
    neither `*.layers.2.*` nor `*layers.2*` touches layer 20. The word for a part of the model, such as `attention` or
    `experts` (`fp4rl sites` shows them), means all of it.
    """

    take: Patterns = Field(default=("*",), description="patterns of the sites that are meant")
    leave: Patterns = Field(default=LEFT_BY_DEFAULT, description="patterns of sites that are not, beside the default")
    leave_only: Patterns | None = later_key(None, description="patterns of sites that are not, in place of the default")
    layers: tuple[int, ...] | None = Field(default=None, description="only these; negative ones count from the end")
    opt_in: Annotated[tuple[OptIn, ...], WordOrList] = Field(
        default=(), description="what is rounded only where it is named here"
    )

    @model_validator(mode="before")
    @classmethod
    def _all_that_is_left(cls, value: Any) -> Any:
        """Write out in `leave` all that is left: the default, but for what is opted in, and what is named."""
        if not isinstance(value, dict):
            return value
        if value.get("leave_only") is not None:
            return {"leave": value["leave_only"]} | value
        given, own = value.get("opt_in") or (), value.get("leave", ())
        roles = (given,) if isinstance(given, str) else given if isinstance(given, list | tuple) else ()
        lifted = {pattern for role in roles for pattern in _LEAVES.get(str(role), ())}
        default = [pattern for pattern in LEFT_BY_DEFAULT if pattern not in lifted]
        own = (own,) if isinstance(own, str) else own
        return {
            **value,
            "leave": (*default, *(p for p in own if p not in default)) if isinstance(own, list | tuple) else own,
        }

    def _conflicts(self) -> Iterator[str]:
        if self.leave_only not in (None, self.leave):
            yield "leave_only says all that is left, so `leave` would do nothing; write one of them"
        for role in self.opt_in:
            if set(_LEAVES[role]) <= set(self.leave):
                yield (
                    f"opt_in: [{role}] would do nothing, because leave holds {', '.join(map(repr, _LEAVES[role]))}; "
                    "take that out of leave"
                )
        for pattern in (*self.take, *self.leave):
            if not pattern.strip():
                yield "an empty pattern matches nothing; write '*' for every site, or leave it out"
            compiled(pattern)
        if not self.take:
            yield "`take` is empty; write '*' for every site"
        if self.layers == ():
            yield "`layers` is empty; leave it out for all layers, or name some, such as [0, -1]"

    def why_left(self, name: str, role: str = "", part: str = "") -> str | None:
        """Return the pattern that leaves `name` out, in words; None when `name` is taken (layers are not looked at).

        A default pattern of a `role` means every site of that role, whatever it is called; the word for a `part` of the
        model means all of that part.
        """
        if not any(pattern == part or matches(name, pattern) for pattern in self.take):
            return "no pattern of take matches"
        leave = [p for p in self.leave if p not in _NO_LAYERS] if part in _LAYERS else self.leave
        hits = [pattern for pattern in leave if pattern == part or matches(name, pattern)]
        hits += [pattern for pattern in _LEAVES.get(role, ()) if pattern in self.leave]
        return f"left by {hits[0]!r}" if hits else None

    def leaving(self, patterns: Iterable[str]) -> "Targets":
        """Return the same with more patterns left."""
        leave = (*self.leave, *patterns)
        return self.model_copy(update={"leave": leave, "leave_only": None if self.leave_only is None else leave})

    def layer_numbers(self, count: int) -> frozenset[int] | None:
        """Return the layers counted from 0 in a model of `count`; None for all. Raises InvalidValueError outside it."""
        if self.layers is None:
            return None
        for layer in self.layers:
            if not -count <= layer < count:
                raise InvalidValueError(f"layers: {layer} is not in this model, which has layers 0 to {count - 1}")
        return frozenset(layer % count for layer in self.layers)


def matches(name: str, pattern: str) -> bool:
    """Return whether the shell pattern covers the whole dotted name, numbers as whole numbers."""
    return compiled(pattern).fullmatch(name) is not None


def require_hit(pattern: str, names: Iterable[str], what: str) -> None:
    """Raise NotFoundError, naming the nearest names, when `pattern` matches none of `names`."""
    known = list(names)
    if not any(matches(name, pattern) for name in known):
        raise NotFoundError(f"no {what} matches {pattern!r}{_nearest_places(pattern, known)}")


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """Return the pattern as a regular expression; InvalidValueError for an open bracket."""
    pieces, out = _PIECE.findall(pattern), ""
    for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
        if piece == "*":
            # A star next to a digit must not swallow part of a number: `layers.2*` is layer 2 and what is below it.
            out += (r"(?!\d)" if before.isdigit() else "") + ".*" + (r"(?<!\d)" if after.isdigit() else "")
        elif piece == "?":
            out += "."
        elif piece == "[":
            raise InvalidValueError(f"the bracket in {pattern!r} is never closed; a character class is written [0-3]")
        elif len(piece) > 1:
            out += "[" + ("^" + piece[2:-1] if piece[1] in "!^" else piece[1:-1]).replace("\\", r"\\") + "]"
        else:
            out += re.escape(piece)
    return re.compile(out, re.DOTALL)


def _nearest_places(pattern: str, names: list[str]) -> str:
    """Return up to three patterns, made from names of the model, that are most similar to the given one."""
    ends = {f"*.{name.rsplit('.', 1)[-1]}" for name in names if "." in name}
    layers = {f"*.{layer[1]}.*" for name in names if (layer := re.search(r"(?:^|\.)(\w+\.\d+)\.", name))}
    close = get_close_matches(pattern, sorted(ends | layers), n=3, cutoff=0.5) or get_close_matches(
        pattern, names, n=3, cutoff=0
    )
    return f"; did you mean {' or '.join(repr(word) for word in close)}?" if close else "; there is none at all"
