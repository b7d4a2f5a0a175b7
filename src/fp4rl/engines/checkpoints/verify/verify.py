"""Compare a checkpoint with what was trained, by value: files, weights, sites, inputs, all else, what it computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4rl.engines.checkpoints.export import ADAPTER
from fp4rl.engines.checkpoints.verify.against import Against, Request, against, recorded_injection
from fp4rl.engines.checkpoints.verify.answers import computed
from fp4rl.engines.checkpoints.verify.beside import beside
from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.engines.checkpoints.verify.files import files, read_record, recorded
from fp4rl.engines.checkpoints.verify.findings import Check, Verified
from fp4rl.engines.checkpoints.verify.served import served
from fp4rl.engines.checkpoints.verify.trained import Trained
from fp4rl.engines.checkpoints.verify.weights import Said, Weights, adapter
from fp4rl.models.load import base_of
from fp4rl.models.shards import all_tensors
from fp4rl.spec.errors import UserError


def verify(out: Path, request: Request, said: Said = lambda *_: None, *, engine: str | None = None) -> Verified:
    """Compare the folder `out` with what `request` names, or its own record; with `engine` also what it computes.

    What cannot be read in `out` is a difference too. Raises NotFoundError and InvalidValueError for what is requested.
    """
    record = read_record(out)
    checked = files(out, record)
    try:
        checkpoint = Checkpoint.open(out)
    except UserError as error:
        checked.differs("the folder", f"cannot be read: {error}", files=1)
        return Verified(str(out), "cannot be read", None, None, (checked,))
    meant = against(request, record, checkpoint)
    layout = checkpoint.method or "plain weights"
    if record is not None:
        recorded(out, record, checkpoint.method, _made_from(meant, request), checked)
    if meant is None:
        source = record and record.get("source")
        gone = f"{source} is not here any more" if source else "nothing here says what it was made from"
        checked.notes.append(f"{gone}, so that no value was compared; name a run or a model folder with --against")
        return Verified(str(out), layout, None, None, (checked,))
    said("policy computed", 0, 1)
    trained = Trained.of(meant.folder, meant.dtype, meant.experts, meant.injection)
    said("policy computed", 1, 1)
    weights = Weights(checkpoint, trained, trained_inputs=record is not None or meant.run is not None)
    checks = weights.checks(all_tensors(base_of(meant.folder) or meant.folder), said)
    if record is not None:
        _record(record, meant, trained, checks[1])
    if (out / ADAPTER).is_dir():
        adapter(out, meant.folder, checks[-1])
    checks = (*checks, beside(checkpoint, trained, meant.folder))
    if engine == "vllm":
        checks = (*checks, served(checkpoint, trained, meant))
    elif engine is not None:
        checks = (*checks, computed(checkpoint, trained, meant, said, reordered=weights.reordered))
    injection = meant.injection.model_dump(mode="json")
    return Verified(str(out), layout, meant.name, injection, (checked, *checks))


def _made_from(meant: Against | None, request: Request) -> Mapping[str, str | None] | None:
    """Return what an export of the recorded source has in its record; None where that is not what is compared with."""
    if meant is None or request.against is not None:
        return None
    run = meant.run
    return {"run": run.key if run else None, "spec_digest": run.result.spec_digest if run else None}


def _record(record: Mapping[str, Any], meant: Against, trained: Trained, check: Check) -> None:
    """Compare the table of sites with the one of the export."""
    if recorded_injection(record) != meant.injection:
        check.notes.append("compared under another injection than the export recorded")
    elif (now := trained.table.digest_in("evaluation")) != record.get("sites_digest"):
        how = f"its digest is {now}, but {record.get('sites_digest')} was recorded: another model, or another fp4rl"
        check.differs("the table of sites", how)
