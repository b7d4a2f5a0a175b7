"""Write a policy as a checkpoint: whole or not at all, tensor by tensor."""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fp4rl
from fp4rl.engines.checkpoints.card import card
from fp4rl.engines.checkpoints.exported import Exported
from fp4rl.engines.checkpoints.layouts.layout import Layout, Named
from fp4rl.engines.checkpoints.policy import Policy
from fp4rl.engines.checkpoints.shards import write_tensors
from fp4rl.engines.checkpoints.source import Source
from fp4rl.models.load import TOKENIZERS
from fp4rl.models.save import PROCESSOR
from fp4rl.spec.errors import InvalidValueError

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


def export(
    source: Source, layout: Layout, out: Path, *, override: bool = False, said: Said = lambda *_: None
) -> Exported:
    """Write `source` to the new folder `out`.

    Raises InvalidValueError for a folder that is there already, for what the layout cannot hold, and without `override`
    for another mode, rule or merge than was evaluated and what the deployment does not serve; else the card says so.
    """
    _require_new(out)
    policy = Policy.of(source.folder, source.injection)
    if not policy.rounded:
        raise InvalidValueError(f"{source.name}: the injection rounds no weight of it, so there is nothing to pack")
    layout.require(policy)
    overridden = tuple(_objections(source, policy, layout))
    if overridden and not override:
        raise InvalidValueError(f"{overridden[0]}; --anyway writes it all the same, and its card says so")
    with _whole_folder(out) as partial:
        sizes = dict[str, int]()
        stored = write_tensors(partial, layout, _tensors(policy, layout, sizes, said))
        bits = 8 * sum(sizes[e.name] for e in policy.rounded) / sum(e.stored.elements for e in policy.rounded)
        exported = Exported(out, source, policy, layout, stored, bits, overridden)
        for name, text in layout.texts(policy, stored).items():
            (partial / name).write_text(text, encoding="utf-8")
        _copy_beside(source.folder, policy.folder, partial)
        if policy.start != policy.folder and policy.injection.lora == "adapter":
            _copy_adapter(policy.start, partial / ADAPTER, out)
        (partial / "README.md").write_text(card(exported), encoding="utf-8")
        record = _record(exported, partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return exported


def _objections(source: Source, policy: Policy, layout: Layout) -> Iterator[str]:
    """Yield why this should not be written."""
    if (why := source.changed()) is not None:
        yield why
    if (why := source.not_judged(policy.table)) is not None:
        yield why
    yield from layout.unserved(policy)
    if source.run is not None:
        yield from layout.computed_otherwise(policy)


def _tensors(policy: Policy, layout: Layout, sizes: dict[str, int], said: Said) -> Iterator[Named]:
    """Yield every tensor of the layout; `sizes` gets the bytes that each entry takes in it."""
    entries = tuple(layout.entries(policy))
    total, done = sum(entry.stored.bytes for entry in entries), 0
    for entry in entries:
        for name, tensor in layout.tensors(policy, entry):
            sizes[entry.name] = sizes.get(entry.name, 0) + tensor.nbytes
            yield name, tensor
        done += entry.stored.bytes
        said(done, total)


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValueError(f"{out} is there already and is not overwritten; name a new folder")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise InvalidValueError(f"there is no folder {parent}; make it, or name another place")
    if not os.access(parent, os.W_OK):
        raise InvalidValueError(f"cannot write to {parent}; name another place")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; it is moved to `out` with all its content on disk, or removed on an exception."""
    partial = out.resolve().with_name(f".{out.resolve().name}.{os.getpid()}.partial")
    _remove_left_behind(out.resolve())
    with _ended_by_sigterm():
        try:
            partial.mkdir()
            yield partial
            for file in (*partial.rglob("*"), partial):
                _sync(file)
            partial.replace(out.resolve())
            _sync(out.resolve().parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end a job, be an exception, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_left_behind(out: Path) -> None:
    """Remove what exports to `out` left behind that were killed."""
    for left in out.parent.glob(f".{out.name}.*.partial"):
        process = left.name.removesuffix(".partial").rpartition(".")[2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_beside(start: Path, folder: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and processor, each from the first folder that has it."""
    for name in dict.fromkeys(_BESIDE):
        given = next((file for file in (start / name, folder / name) if file.is_file()), None)
        if given is not None and not (out / name).exists():
            shutil.copyfile(given, out / name)
    templates = next((source for source in (start, folder) if (source / "additional_chat_templates").is_dir()), None)
    if templates is not None:
        shutil.copytree(templates / "additional_chat_templates", out / "additional_chat_templates")


def _copy_adapter(start: Path, to: Path, out: Path) -> None:
    """Copy an adapter, which will find its packed base in `out`."""
    to.mkdir()
    for file in start.glob("adapter_*"):
        shutil.copyfile(file, to / file.name)
    config = json.loads((to / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(out.resolve())
    (to / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _record(exported: Exported, folder: Path) -> Mapping[str, Any]:
    """Return what `fp4rl verify` reads: what was exported, under which injection, and the checksum of every file."""
    source, policy = exported.source, exported.policy
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    run = source.run
    return {
        "fp4rl": fp4rl.__version__,
        "layout": exported.layout.name,
        "source": str(source.folder.resolve()),
        "run": run.key if run else None,
        "spec_digest": run.result.spec_digest if run else None,
        "injection": policy.injection.model_dump(mode="json"),
        "sites_digest": policy.table.digest_in("evaluation"),
        "overridden": list(exported.overridden),
        "sha256": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
    }


def sha256(file: Path) -> str:
    """Return the checksum of a file, 64 hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
