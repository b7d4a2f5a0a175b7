"""What stands beside the weights and decides what is computed: configuration, tokenizer, what is to be quantized."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.engines.checkpoints.verify.trained import Trained
from fp4rl.models.load import base_of, load_tokenizer
from fp4rl.models.packed.ascend_v1 import DESCRIPTION, TYPES
from fp4rl.spec.errors import UserError

# Keys of config.json that say nothing of what is computed, or that an export is meant to change.
_OTHERWISE = {"quantization_config", "compression_config", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_OTHERWISE |= {"_name_or_path", "architectures", "experts_implementation", "tie_word_embeddings"}
_PROBE = "What is 12 + 345? #### 7\n"
_MANY = 8


def beside(checkpoint: Checkpoint, trained: Trained, folder: Path) -> Check:
    """Compare everything but tensors with the folder of the policy."""
    check, base = Check("configuration"), base_of(folder) or folder
    _json_files(check, checkpoint.folder, base)
    _tokenizers(check, checkpoint.folder, trained)
    config = _read(checkpoint.folder / "config.json").get("quantization_config") or {}
    for number, group in (config.get("config_groups") or {}).items():
        if group.get("output_activations"):
            check.differs(f"quantization_config.{number}", "has outputs rounded, which the policy does not", keys=1)
    _type_of_all(check, checkpoint)
    for name in _meant_by(config, trained):
        check.differs(name, "is left by the policy, and quantization_config means it to be quantized", keys=1)
    return check


def _type_of_all(check: Check, checkpoint: Checkpoint) -> None:
    """Compare the type that AscendV1 gives the whole model with those of its tensors."""
    if not (checkpoint.method or "").startswith("AscendV1"):
        return
    said = _read(checkpoint.folder / DESCRIPTION)
    whole = said.pop("model_quant_type", None)
    types = [kind for kind in TYPES if kind in said.values()]
    check.count(keys=1)
    if whole not in types:
        how = f"is {whole!r}, and its tensors are of {' and '.join(types) or 'no type'}"
        check.differs(f"{DESCRIPTION}: model_quant_type", how, keys=1)


def _json_files(check: Check, out: Path, base: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        own, now = dict(_flat(_read(base / file))), dict(_flat(_read(out / file)))
        check.count(keys=len(own))
        if own and not now:
            check.differs(file, "is missing", keys=len(own))
            continue
        # One file may write out what the other leaves at its default, so that only contradictions count.
        wrong = [key for key in own.keys() & now.keys() if own[key] != now[key]]
        for key in sorted(wrong)[:_MANY]:
            check.differs(f"{file}: {key}", f"is {now[key]!r}, of the policy {own[key]!r}", keys=1)
        if len(wrong) > _MANY:
            check.differs(file, f"{len(wrong) - _MANY} more keys differ", keys=len(wrong) - _MANY)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in _OTHERWISE:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _tokenizers(check: Check, out: Path, trained: Trained) -> None:
    try:
        tokenizer = load_tokenizer(out)
    except UserError as error:
        check.differs("the tokenizer", f"cannot be loaded: {error}", keys=1)
        return
    own: Any = trained.tokenizer
    check.count(keys=len(own))
    ids, wanted = (each.get_vocab() for each in (tokenizer, own))
    wrong = [token for token in wanted.keys() | ids.keys() if ids.get(token) != wanted.get(token)]
    if wrong:
        token = min(wrong)
        how = f"{len(wrong):,} tokens have other ids: {token!r} is {ids.get(token)}, of the policy {wanted.get(token)}"
        check.differs("the tokenizer", how, keys=len(wrong))
    elif tokenizer(_PROBE)["input_ids"] != own(_PROBE)["input_ids"]:
        check.differs("the tokenizer", f"reads {_PROBE!r} as other tokens", keys=1)
    if tokenizer.chat_template != own.chat_template:
        check.differs("the chat template", "is another one than the policy's", keys=1)


def _meant_by(config: Mapping[str, Any], trained: Trained) -> Iterator[str]:
    """Yield the linear layers that the policy leaves and a configuration of compressed-tensors means to quantize."""
    groups = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    ignored = config.get("ignore") or ()
    for site in (left.site for left in trained.table.left_out if left.site.kind == "linear"):
        module = trained.model.get_submodule(site.path)
        if not isinstance(module, nn.Linear) or _hits(site.name, ignored):
            continue
        if any("Linear" in group["targets"] or _hits(site.name, group["targets"]) for group in groups):
            yield site.name


def _hits(name: str, patterns: Iterable[str]) -> bool:
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)
