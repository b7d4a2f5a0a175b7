"""Write a policy as a checkpoint: whole or not at all, tensor by tensor."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fp4rl
from fp4rl.engines.checkpoints.card import card
from fp4rl.engines.checkpoints.layouts.layout import Layout, Named, Stored
from fp4rl.engines.checkpoints.policy import Policy
from fp4rl.engines.checkpoints.shards import write_tensors
from fp4rl.engines.checkpoints.source import Source
from fp4rl.lab.serving import unserved
from fp4rl.models.load import TOKENIZERS
from fp4rl.models.save import PROCESSOR
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import E2M1

RECORD = "fp4rl_export.json"
ADAPTER = "adapter"
# What a folder of a model holds besides weights and what describes them.
_BESIDE = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    *TOKENIZERS,
    *PROCESSOR,
)

Said = Callable[[int, int], None]  # bytes of the unquantized checkpoint done, and of all


@dataclass(frozen=True)
class Exported:
    """A written checkpoint: where, what of, the files of its tensors, and what was overridden to write it."""

    folder: Path
    source: Source
    policy: Policy = field(repr=False)
    layout: Layout
    stored: Stored
    overridden: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Bits stored for one value of the rounded weights."""
        ...


def export(source: Source, layout: Layout, out: Path, *, anyway: bool = False, said: Said = lambda *_: None) -> Exported:
    """Write `source` to the new folder `out`.

    Raises InvalidValueError for a folder that is there already, for what the layout cannot hold, and, without `anyway`,
    for another mode, rule or merge than was evaluated and for what the deployment does not serve; the card then says so.
    """
    _require_new(out)
    policy = Policy.of(source.folder, source.injection)
    if not policy.rounded:
        raise InvalidValueError(f"{source.name}: the injection rounds no weight of it, so there is nothing to pack")
    layout.require(policy)
    overridden = tuple(_objections(source, policy))
    if overridden and not anyway:
        raise InvalidValueError(f"{overridden[0]}; --anyway writes it all the same, and its card says so")
    with _whole_folder(out) as partial:
        stored = write_tensors(partial, layout, _tensors(policy, layout, said))
        exported = Exported(out, source, policy, layout, stored, overridden)
        for name, text in layout.texts(policy, stored).items():
            (partial / name).write_text(text, encoding="utf-8")
        _copy_beside(source.folder, policy.folder, partial)
        if policy.start != policy.folder and policy.injection.lora == "adapter":
            _copy_adapter(policy.start, partial / ADAPTER, out)
        (partial / "README.md").write_text(card(exported), encoding="utf-8")
        record = _record(exported, partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return exported
