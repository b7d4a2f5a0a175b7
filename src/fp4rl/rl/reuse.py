"""The evaluation of a start under one profile: made once below a runs root, and taken by every run that begins there.

An entry holds every answer with its scores, and the evidence of what was rounded meanwhile. Its name is the digest of
everything that these numbers depend on, so that another model, profile, problem, version or line of code never finds
it. It is written under another name and renamed, so that it appears whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from fp4rl.rl import processes
from fp4rl.rl.answered import Answered, Item
from fp4rl.rl.divergence import Divergence
from fp4rl.rl.durable import sync
from fp4rl.rl.evaluate import EvaluationRunner
from fp4rl.rl.events import Emit, Message
from fp4rl.spec import evidence
from fp4rl.spec.injection import Injection
from fp4rl.spec.records import read_evidence

_LOOK_S = 0.5  # between two looks at whether another process is done, and whether this one shall end
# What a damaged file raises on its way to an entry.
_SYMPTOMS = (OSError, ValueError, LookupError, TypeError, AttributeError)
_HOW = {"samples", "temperature", "seed", "batch_size", "max_new_tokens", "stop", "kl"}


def facts(
    model: tuple[str, str], runner: EvaluationRunner, profile: evidence.Profile, injection: Injection | None
) -> dict[str, Any]:
    """Return, for JSON, what an evaluation depends on besides code; `model`: digest of its files, and its dtype."""
    problems = json.dumps([asdict(problem) for problem in runner.problems])
    return {
        "model": model,
        "lora": None if runner.lora is None else runner.lora.model_dump(mode="json"),
        "experts": runner.experts,
        "profile": {name: value for name, value in profile.as_json().items() if name != "name"},
        "drawn_from": None if injection is None else injection.seed,
        "how": runner.spec.model_dump(mode="json", include=_HOW),
        "problems": hashlib.sha256(problems.encode()).hexdigest(),
        "task": runner.task.model_dump(mode="json"),
        "device": processes.device().type,
        "threads": torch.get_num_threads(),
    }


def taken(
    folder: Path,
    described: Mapping[str, Any],
    profile: str,
    answered: Callable[[], Answered],
    told: tuple[Callable[[], None], Emit],
) -> Answered:
    """Return the entry in `folder` of an evaluation that is `described`; where there is none, or a damaged one, what
    `answered` gives, which is kept.

    Of two processes that need it at once, one makes it; the other calls the first of `told` now and then until it is
    there. The second gets what became of it.
    """
    waiting, emit = told
    path = folder / f"{_digest(described)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock"), waiting):
        if path.is_file():
            try:
                kept = _read(path, described)
            except _SYMPTOMS as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                emit(Message(f"{path} is damaged ({why}); the start is evaluated as {profile} again", log_only=True))
            else:
                emit(evidence.Reused(profile=profile, entry=path.stem))
                emit(Message(f"the start as {profile}: answers of {path}, made by a run before", log_only=True))
                return kept
        made = answered()
        _write(path, described, made)
    return made


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    lock = FileLock(path)  # released when the process dies
    while True:
        try:
            lock.acquire(timeout=_LOOK_S, poll_interval=0.05)
        except Timeout:
            waiting()
        else:
            break
    try:
        yield
    finally:
        lock.release()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, described: Mapping[str, Any], answered: Answered) -> None:
    content = {
        "described": described,
        "items": [asdict(item) for item in answered.items],
        "evidence": [{"kind": line.kind} | line.as_json() for line in answered.lines],
        "divergence": None if answered.far is None else asdict(answered.far),
    }
    partial = path.with_suffix(".partial")  # ours alone, since we hold the lock
    with partial.open("w", encoding="ascii") as file:
        json.dump(content | {"digest": _digest(content)}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def _read(path: Path, described: Mapping[str, Any]) -> Answered:
    content = json.loads(path.read_text(encoding="ascii"))
    if content.pop("digest") != _digest(content) or _digest(content["described"]) != _digest(described):
        raise ValueError("its contents are not those that were written")
    lines = tuple(line for line in map(read_evidence, content["evidence"]) if line is not None)
    far = content["divergence"]
    items = tuple(Item(**item) for item in content["items"])
    return Answered(items, lines, None if far is None else Divergence(**far))
