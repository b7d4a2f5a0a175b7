"""YAML as descriptions use it: plain values, each key once, finite aliases; anything else is a one-line error."""

import json
from itertools import chain
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode

from fp4rl.spec.errors import InvalidValueError

_DEEPEST = 40
_MOST_VALUES = 100_000  # with every alias written out: a few lines of aliases can mean billions of values
_KINDS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_TEXT, _DATE, _EQUALS = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "value"))


# libyaml's parser where PyYAML was built with it. Its composer is not used: deep nesting overflows its stack.
_PARSER: Any = (Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that no description may hold."""

    def __init__(self, problem: str, node: Any) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


class _Loader(*_PARSER):  # type: ignore[misc]
    """Composes in Python, so that depth, size, keys and tags are looked at before anything is built."""

    def __init__(self, text: str) -> None:
        _PARSER[-1].__init__(self, text)
        Composer.__init__(self)
        self._depth = 0
        self._values: dict[Node, int] = {}  # how many values stand below a node that is complete

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Refused(f"nested deeper than {_DEEPEST} levels", event)
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._look_at(node, event)
        return node

    def _look_at(self, node: Node, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            if node not in self._values:
                raise _Refused(f"the alias *{event.anchor} stands inside what it means", event)
            return
        if node.tag in (_DATE, _EQUALS) and isinstance(node, ScalarNode):
            node.tag = _TEXT
        if node.tag not in _KINDS:
            raise _Refused(
                f"values of the kind {node.tag.replace('tag:yaml.org,2002:', '!!')} have no place here", event
            )
        below = () if isinstance(node, ScalarNode) else node.value
        parts = chain.from_iterable(below) if isinstance(node, MappingNode) else below
        self._values[node] = 1 + sum(self._values[part] for part in parts)
        if self._values[node] > _MOST_VALUES:
            raise _Refused(f"more than {_MOST_VALUES:,} values with its aliases written out", event)
        if isinstance(node, MappingNode):
            _require_each_key_once(node)


def _require_each_key_once(node: MappingNode) -> None:
    """Raise for a key that stands twice; `0` and `"0"` are the same key, a layer's number."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _Refused("a key is a single word or number", key)
        if key.value in seen:
            raise _Refused(f"the key {key.value!r} stands here twice; keep one", key)
        seen.add(key.value)


def plain_values(text: str, source: str, cure: str = "") -> Any:
    """Return the values in `text`. Raises InvalidValueError, in one line with `source` and the line, for anything else:
    a syntax error (with `cure`), a key that stands twice, an endless alias, a tag that builds an object."""
    try:
        value = _Loader(text).get_single_data()
        json.dumps(value, ensure_ascii=False).encode()  # every text in it can be written to a file
        return value
    except _Refused as error:
        wrong = f"{_line(error)}{error.problem}"
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        wrong = f"{_line(error)}{problem}; this is not valid YAML{cure and f'; {cure}'}"
    except UnicodeEncodeError:
        wrong = "holds half a surrogate pair, which is no text"
    except (ValueError, KeyError, OverflowError) as error:  # a tag such as !!int before a word
        wrong = f"{error}; a value does not fit the kind that it is said to be"
    raise InvalidValueError(f"{source}: {wrong}")


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark else ""
