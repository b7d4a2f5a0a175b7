"""Run folders as the runner writes them, with numbers that a test chooses."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sqlalchemy import select

from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.store import Ledger, open_ledger
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import Evidence
from fp4rl.spec.records import Sites, read_result
from planted.records import line

SPEC: dict[str, Any] = {
    "model": {"embedded": {"hidden_size": 64}, "dtype": "float32"},
    "task": {"name": "arithmetic", "difficulty": 2},
    "training": {"algorithm": "dapo", "steps": 30, "lr": 4e-4},
    "injection": None,
    "noise": None,
    "evaluation": {"count": 40},
}
PROFILE: dict[str, Any] = {
    "name": "deployment",
    "precision": "w4a4",
    "sites_digest": "aaaa",
    "noise": "off",
    "scorer": "strict-1",
    "max_new_tokens": 48,
    "sampling": "greedy",
    "items_digest": "pppp",
}
EVIDENCE = {"sites": 14, "calls": {"training": 420, "rollout": 900}, "master_unharmed": True}

MakeRun = Callable[..., RunFolder]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(arm, seed, strict, spec=..., profile=..., evidence=...)` -> a finished run in `tmp_path/runs`.

    `strict`: a share, or the flags of all problems (then items are stored too). Nested changes of `spec` are merged.
    """

    def make(
        arm: str = "bf16",
        seed: int = 0,
        strict: float | Sequence[bool] = 0.5,
        *,
        suite: str = "trial",
        spec: Mapping[str, Any] | None = None,
        profile: Mapping[str, Any] | None = None,
        **result: Any,
    ) -> RunFolder:
        conditions = PROFILE | dict(profile or {})
        judged = {"evaluation": {"profiles": [conditions["name"]]}}
        described = _merged(_merged(SPEC, judged), spec or {}) | {"seed": seed}
        key = digest(described)
        run = run_folder(tmp_path / "runs", suite, f"{arm}-s{seed}-{key}")
        run.write_spec(yaml.safe_dump(described, sort_keys=False))
        run.write_sites(Sites(digest="aaaa", plans=(), left_out=()))
        for row in _rounded(described, result.get("evidence", EVIDENCE)):
            run.add_evidence(row)
        steps = described["training"]["steps"]
        run.add_evidence(line("master", step=steps))
        run.add_evidence(line("live_equals_fresh"))
        for step in range(3):
            run.add_metrics(step, {"reward/mean": 0.1 * step + 0.01 * seed, "grad_norm": float("nan")})
        share = strict if isinstance(strict, float) else sum(strict) / len(strict)
        if not isinstance(strict, float):
            run.write_items(steps, conditions["name"], _items(strict))
        scores = {"n": 40, "strict": share, "flexible": share, "formatted": 1.0, "mean_length": 20.0}
        last = {"step": steps, "last": True, "profile": conditions} | scores
        first = {"step": 0, "last": False, "profile": conditions} | scores | {"strict": 0.3}
        content = {
            "run_id": run.run_id,
            "suite": suite,
            "arm": arm,
            "seed": seed,
            "spec_digest": key,
            "code_digest": "cccc",
            "versions": {"torch": "2.13"},
            "evaluations": [first, last],
            "evidence": EVIDENCE,
            "steps_asked": steps,
            "steps_done": steps,
            "wall_s": 12.5,
        } | result
        run.write_result(read_result(content))
        return run

    return make


def _rounded(spec: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Evidence]:
    """A row of proof for each point of the injection, in every phase that the summary counts calls of."""
    for phase, calls in evidence.get("calls", {}).items():
        for point in ("weight", "input"):
            if (spec["injection"] or {}).get(point):
                yield line("injection", phase=phase, point=point, calls=calls)


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = deepcopy(dict(base))
    for key, value in change.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _items(flags: Sequence[bool]) -> list[dict[str, Any]]:
    order = np.random.default_rng(0).permutation(len(flags))
    return [
        {
            "problem_id": f"p{index:04d}",
            "sample": 0,
            "strict": bool(flags[index]),
            "flexible": True,
            "formatted": True,
            "completion": f"#### {index}",
            "length": int(index) + 1,
            "truncated": False,
        }
        for index in order
    ]


_WRITER = """
import sys, time
from pathlib import Path
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger.record import record
from fp4rl.lab.ledger.store import open_ledger

where, meeting, name, *folders = sys.argv[1:]
(Path(meeting) / name).touch()
while len(list(Path(meeting).iterdir())) < 2:
    time.sleep(0.005)
ledger = open_ledger(where)
for folder in folders:
    record(ledger, RunFolder(Path(folder)), {})
"""


@pytest.fixture
def write_at_once(tmp_path: Path) -> Callable[[str, list[RunFolder], list[RunFolder]], None]:
    """Two processes that wait for each other, open the same ledger and record their runs; fails if one of them does."""

    def write(where: str, first: list[RunFolder], second: list[RunFolder]) -> None:
        meeting = tmp_path / "meeting"
        meeting.mkdir()
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", _WRITER, where, meeting, name, *(run.path for run in runs)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, runs in (("first", first), ("second", second))
        ]
        ends = [(writer.communicate(timeout=300)[1], writer.returncode) for writer in writers]
        assert ends == [("", 0), ("", 0)]

    return write


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str | Path], Ledger]]:
    """`open_ledger` for the folders of `make_run`, with all that was opened closed after the test."""
    with ExitStack() as stack:
        yield lambda where: stack.enter_context(open_ledger(where, tmp_path / "runs"))


@pytest.fixture
def all_rows() -> Callable[[Ledger], dict[str, list[str]]]:
    """Every row of every table of a ledger as text, in an order that does not depend on the database."""

    def read(ledger: Ledger) -> dict[str, list[str]]:
        with ledger.reading() as connection:
            return {
                table.name: sorted(repr([_plain(value) for value in row]) for row in connection.execute(select(table)))
                for table in tables.metadata.sorted_tables
            }

    return read


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value
